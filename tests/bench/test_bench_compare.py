"""Two results side by side: what is paired, what it says, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foveate.bench.cells import plan
from foveate.bench.compare import Side, compare
from foveate.bench.folder import ResultFolder, Results, Settings
from foveate.bench.run import run
from foveate.core.errors import FoveateError
from foveate.core.files import write_json
from foveate.report.compare_table import compare_table
from foveate.tasks import questions

asked_before = cache(questions)
BASE = Settings("reference", 40, 0, "cpu", "float32", 8)


@pytest.fixture
def results(tmp_path: Path, measure: Any, log: Any) -> Any:
    """Makes a folder of made-up results; ``quality`` replaces the score of every question of a method."""

    def make(name: str, settings: Settings = BASE, methods: tuple[str, ...] = ("hiprune",), **quality: float) -> Path:
        def answered(cell: Any, asked: Any, advance: Any) -> Any:
            measured = measure(cell, asked, advance)
            right = quality.get(cell.method)
            if right is None:
                return measured
            answers = [replace(each, score=float(i < right * len(asked))) for i, each in enumerate(measured.answers)]
            return replace(measured, answers=answers)

        folder = ResultFolder(tmp_path / name, settings)
        ask = partial(asked_before, n=settings.n, seed=settings.seed)
        run(plan(["shape", "existence"], methods, [0.5, 0.25]), ask, answered, folder, log)
        assert not log.failures
        return folder.path

    return make


def sides(*texts: object) -> list[Side]:
    return [Side.parse(str(text)) for text in texts]


def test_cells_of_the_same_task_method_and_budget_are_paired(results: Any) -> None:
    a, b = results("a"), results("b", methods=("fastv", "hiprune"))

    compared = compare(*sides(a, b))

    assert [each.task for each in compared] == ["shape", "existence"]
    assert all(pair.a.key == pair.b.key for each in compared for pair in each.pairs)
    assert len(compared[0].pairs) == 1 + 5 * 2
    assert compared[0].judged == 2
    assert {each.verdict for each in compared} == {"no difference beyond noise"}


@pytest.mark.parametrize(("quality", "verdict"), [(1.0, "better"), (0.4, "worse"), (0.8, "no difference beyond noise")])
def test_the_verdict_is_b_s(results: Any, quality: float, verdict: str) -> None:
    a, b = results("a"), results("b", hiprune=quality)

    (shape, _) = compare(*sides(f"{a}:hiprune@0.5", b))

    assert shape.verdict == verdict
    assert shape.difference.mean == pytest.approx(quality - 0.8)


def test_two_methods_of_one_folder_are_compared(results: Any) -> None:
    a = results("a")

    compared = compare(*sides(f"{a}:hiprune@0.5", f"{a}:random@0.25"))

    ((pair,), _) = [each.pairs for each in compared]
    assert (pair.a.key, pair.b.key) == (("shape", "hiprune", "0.5"), ("shape", "random", "0.25"))
    assert pair.speedups == (2.0, 4.0)


def test_a_method_without_a_budget_is_picked_by_its_name(results: Any) -> None:
    a = results("a")

    (shape, _) = compare(*sides(f"{a}:none", f"{a / 'results.json'}:uniform@0.5"))

    assert shape.pairs[0].a.method == "none"


def test_several_methods_on_a_question_count_as_one_question(results: Any) -> None:
    a, b = results("a"), results("b", hiprune=1.0)

    one = compare(*sides(f"{a}:hiprune@0.5", b))[0]
    # Both budgets gain on the same questions; that they agree is no further evidence.
    both = compare(*sides(a, b))[0]

    assert (one.judged, both.judged) == (1, 2)
    assert both.difference == one.difference


@pytest.mark.parametrize(("name", "value"), [("n", 20), ("seed", 1), ("digest", "other"), ("metric", "anls")])
def test_answers_to_other_questions_are_refused_by_name(results: Any, name: str, value: object) -> None:
    a, b = results("a"), results("b", replace(BASE, **{name: value}))

    with pytest.raises(FoveateError, match=f"^{name}=.*cannot be paired"):
        compare(*sides(a, b))


def test_questions_that_changed_with_the_version_are_refused(results: Any) -> None:
    a, b = results("a"), results("b")
    path = next((b / "cells").glob("shape.hiprune.*"))
    cell = json.loads(path.read_text())
    cell["answers"][0]["prompt"] = "another?"
    write_json(path, cell)

    with pytest.raises(FoveateError, match=r"task='shape': .* asked other questions"):
        compare(*sides(a, b))


def test_results_of_different_models_are_compared(results: Any) -> None:
    a, b = results("a"), results("b", replace(BASE, model="elsewhere"))

    assert compare(*sides(a, b))


def test_nothing_in_common_is_said(results: Any) -> None:
    a, b = results("a"), results("b")
    for path in (a, b):
        kept = [each for each in json.loads((path / "results.json").read_text()) if each["task"] == path.name]
        write_json(path / "results.json", kept)

    with pytest.raises(FoveateError, match="have no finished cell of the same task"):
        compare(*sides(a, b))


def test_what_was_not_measured_cannot_be_picked(results: Any) -> None:
    with pytest.raises(FoveateError, match=r"'hiprune@0.9': was not measured in .*; there are none, random@0.5"):
        Side.parse(f"{results('a')}:hiprune@0.9")


@pytest.mark.parametrize("content", [None, "{}", '{"model": "x"}'])
def test_a_folder_without_results_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "settings.json").write_text(content)

    with pytest.raises(FoveateError, match="holds no results of a bench"):
        Results.open(tmp_path)


def test_the_table_names_both_methods_and_the_verdict(results: Any) -> None:
    a = results("a")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(compare_table(compare(*sides(f"{a}:hiprune@0.5", f"{a}:random@0.5"))))
    text = console.export_text()

    assert "hiprune 0.5 → random 0.5" in text
    assert "shape: B is worse (-30.0 [" in text
    assert "…" not in text
