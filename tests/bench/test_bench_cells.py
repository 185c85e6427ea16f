"""What is planned, and which budgets and recipes are understood."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.bench.cells import Contender, parse_keeps, parse_methods, plan
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe


def test_reference_points_are_planned_first_whatever_is_asked_for() -> None:
    cells = plan(["shape"], ["fastv"], [0.5])

    assert [cell.method for cell in cells] == ["none", "random", "uniform", "downsample", "pool", "fastv"]


def test_methods_that_are_named_twice_are_planned_once() -> None:
    cells = plan(["shape"], ["random", "none", "fastv", "fastv"], [0.5])

    assert [cell.method for cell in cells] == ["none", "random", "uniform", "downsample", "pool", "fastv"]


def test_every_method_with_a_budget_meets_every_budget_and_every_task() -> None:
    cells = plan(["shape", "reading"], [], [0.5, 16])

    assert [(cell.task, cell.method, cell.keep) for cell in cells] == [
        (task, method, keep)
        for task in ("shape", "reading")
        for method, keep in (
            ("none", None),
            *((name, keep) for name in ("random", "uniform", "downsample", "pool") for keep in (0.5, 16)),
        )
    ]


def test_a_method_without_a_budget_is_planned_once() -> None:
    cells = plan(["shape"], ["shortv"], [0.5, 0.25])

    assert [cell.keep for cell in cells if cell.method == "shortv"] == [None]


def test_the_budget_fills_every_keep_that_a_recipe_leaves_open() -> None:
    contender = Contender.parse("hiprune(alpha=0.2) + fastv(layer=3, keep=0.5)")

    assert contender.at(32) == Recipe.parse("hiprune(alpha=0.2, keep=32) + fastv(layer=3, keep=0.5)")


def test_a_recipe_that_says_all_its_budgets_is_planned_once() -> None:
    (cell,) = [cell for cell in plan(["shape"], ["hiprune(keep=16)"], [0.5, 0.25]) if "hiprune" in cell.method]

    assert (cell.keep, cell.recipe) == (None, Recipe.parse("hiprune(keep=16)"))


def test_commas_inside_a_recipe_do_not_separate_methods() -> None:
    assert parse_methods("random, fastv(layer=2, keep=0.5) + hiprune,scope") == [
        "random",
        "fastv(layer=2, keep=0.5) + hiprune",
        "scope",
    ]


def test_budgets_with_a_point_are_ratios_and_others_are_counts() -> None:
    keeps = parse_keeps("0.22, 32,1.0")

    assert [(type(keep), keep) for keep in keeps] == [(float, 0.22), (int, 32), (float, 1.0)]


@pytest.mark.parametrize("text", ["0", "0.0", "-3", "1.5", "1e9", "nan", "many", "0.5,", ""])
def test_a_budget_that_keeps_nothing_or_is_no_number_is_refused_by_name(text: str) -> None:
    with pytest.raises(FoveateError, match="keep="):
        parse_keeps(text)


@pytest.mark.parametrize("method", ["fastvv", "hiprune(kep=3)", "hiprune(alpha=0.2", "hiprune(keep=0)"])
def test_a_bad_recipe_is_refused_before_anything_runs(method: str) -> None:
    with pytest.raises(FoveateError):
        plan(["shape"], [method], [0.5])


def test_a_recipe_of_a_file_runs_as_it_is_and_under_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- hiprune: {keep: 64}\n- scope\n")
    contender = Contender.parse(str(path))

    assert (contender.text, contender.open) == (str(Recipe.load(path)), ())
    assert contender.budgets((8, 16)) == (None,)
