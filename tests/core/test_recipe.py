"""Recipes read what they print, and say in one line what is wrong with a text."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.methods import FastV, HiPrune, ShortV
from tests.core.strategies import methods

# Many parameters that are drawn are refused, for example even widths of a pooling.
recipes = st.lists(methods(), max_size=3).map(lambda drawn: Recipe(tuple(drawn)))
picky = settings(suppress_health_check=[HealthCheck.filter_too_much])


@picky
@given(recipes)
def test_what_a_recipe_prints_is_read_back(recipe: Recipe) -> None:
    assert Recipe.parse(str(recipe)) == recipe


@picky
@given(recipes)
def test_what_a_recipe_writes_as_yaml_is_read_back(recipe: Recipe) -> None:
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


@picky
@given(recipes)
def test_both_forms_print_alike(recipe: Recipe) -> None:
    assert str(Recipe.from_yaml(recipe.to_yaml())) == str(Recipe.parse(str(recipe))) == str(recipe)


@pytest.mark.parametrize("name", registry.methods())
def test_every_method_can_be_named_alone(name: str) -> None:
    assert Recipe.parse(name) == Recipe.of(registry.get(name)()) == Recipe.from_yaml(f"- {name}")


@pytest.mark.parametrize("text", ["", "  ", "none"])
def test_no_methods_are_the_empty_recipe(text: str) -> None:
    assert Recipe.parse(text) == Recipe()
    assert str(Recipe()) == "none"
    assert Recipe.from_yaml("") == Recipe.from_yaml("none") == Recipe.from_yaml("[]") == Recipe()


def test_methods_stand_in_the_order_in_which_they_are_written() -> None:
    recipe = Recipe.parse("hiprune(keep=64) + fastv(layer=3, keep=0.5) + shortv(layers=(4, 5))")

    assert recipe.methods == (HiPrune(keep=64), FastV(layer=3, keep=0.5), ShortV(layers=(4, 5)))


def test_words_need_no_quotes() -> None:
    assert Recipe.parse("hiprune(border=clamp)") == Recipe.parse("hiprune(border='clamp')")


def test_a_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("- hiprune: {keep: 64}\n- shortv: {layers: [1, 2]}\n")

    assert Recipe.load(path) == Recipe.parse("hiprune(keep=64) + shortv(layers=(1, 2))")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fasttv", "unknown method 'fasttv': did you mean 'fastv'?"),
        ("xyz", "unknown method 'xyz': known: "),
        ("fastv(kep=0.5)", "fastv: unknown parameter 'kep': did you mean 'keep'?"),
        ("fastv(zzz=0.5)", "fastv: unknown parameter 'zzz': it has: layer, keep, score, rounding"),
        ("fastv(keep=0.5", "'(' was never closed"),
        ("fastv keep=0.5)", "recipe 'fastv keep=0.5)': "),
        ("fastv[keep=0.5]", "recipe 'fastv[keep=0.5]': "),
        ("fastv(0.5)", "fastv: parameters need names, as in 'keep=0.5'"),
        ("fastv(**x)", "fastv: '**' is not understood"),
        ("fastv - scope", "join methods with '+'"),
        ("3", "recipe '3': '3' is no method"),
        ("fastv(keep=half)", "fastv: keep='half': must be a positive count"),
        ("fastv(keep=0)", "fastv: keep=0: must be a positive count"),
        ("fastv(keep=1e9)", "fastv: keep=1000000000.0: must be a positive count"),
        ("fastv(keep=1/3)", "fastv: keep=1 / 3: must be a number, a word or a tuple"),
        ("hiprune(border=wrap)", "hiprune: border='wrap': must be 'intersect' or 'clamp'"),
        ("snapkv(kernel=4)", "snapkv: kernel=4: must be an odd integer"),
        ("shortv(layers=(1, -2))", "shortv: layers=(1, -2): must be layer numbers"),
    ],
)
def test_a_text_that_is_wrong_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(FoveateError) as error:
        Recipe.parse(text)

    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fastv: {keep: 0.5}", "recipe: YAML must be a list such as '- hiprune: {keep: 64}'"),
        ("fastv", "recipe: YAML must be a list"),
        ("- 3", "recipe: 3 is no method; write '- name' or '- name: {parameter: value}'"),
        ("- fastv: 0.5", "recipe: {'fastv': 0.5} is no method"),
        ("- fastv: {keep: 0.5\n", "recipe: not valid YAML"),
        ("- fastv: {kep: 0.5}", "fastv: unknown parameter 'kep': did you mean 'keep'?"),
    ],
)
def test_yaml_that_is_wrong_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(FoveateError) as error:
        Recipe.from_yaml(text)

    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"recipe file '.*lost\.yaml': cannot be read \(No such file"):
        Recipe.load(tmp_path / "lost.yaml")


def test_what_is_no_recipe_is_refused() -> None:
    with pytest.raises(FoveateError, match="recipe=3: must be a Recipe, a method, text"):
        Recipe.of(3)  # type: ignore[arg-type]


def test_a_list_is_as_good_as_a_tuple() -> None:
    assert Recipe.parse("shortv(layers=[1, 2])") == Recipe.parse("shortv(layers=(1, 2))")


def test_a_parameter_given_twice_is_refused() -> None:
    with pytest.raises(FoveateError, match="keep"):
        Recipe.parse("fastv(keep=0.5, keep=0.2)")


@pytest.mark.parametrize("text", ["scope(alpha=high)", "hiprune(alpha=None)", "shortv(layers=5.0)"])
def test_a_value_of_the_wrong_type_is_refused_by_name(text: str) -> None:
    name, parameter = text.split("=")[0].split("(")
    with pytest.raises(FoveateError, match=f"{name}: {parameter}="):
        Recipe.parse(text)


def test_infinity_is_refused_by_name() -> None:
    with pytest.raises(FoveateError, match="scope: alpha=inf"):
        Recipe.of(registry.get("scope")(alpha=math.inf))  # type: ignore[call-arg]


def test_a_parameter_that_is_no_name_is_refused() -> None:
    with pytest.raises(FoveateError, match="unknown parameter 1"):
        Recipe.from_yaml("- fastv: {1: 2}")


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "picture.yaml"
    path.write_bytes(b"\x89PNG\r\n")

    with pytest.raises(FoveateError, match=r"picture\.yaml"):
        Recipe.load(path)


QUICK = Recipe((HiPrune(keep=64), ShortV(layers=(1, 2))))


def test_every_form_is_the_same_recipe(tmp_path: Path) -> None:
    path = tmp_path / "quick.YML"
    path.write_text(QUICK.to_yaml())
    forms = [
        QUICK,
        str(QUICK),
        path,
        str(path),
        yaml.safe_load(QUICK.to_yaml()),
        list(QUICK.methods),
        QUICK.methods,
        ["hiprune(keep=64)", {"shortv": {"layers": [1, 2]}}],
        [Recipe(QUICK.methods[:1]), "none", QUICK.methods[1]],
    ]

    assert [Recipe.of(form) for form in forms] == [QUICK] * len(forms)
    assert Recipe.of({"fastv": {"keep": 0.5}}) == Recipe.of({"fastv": None}) == Recipe.of("fastv")
    assert Recipe.of([]) == Recipe.of("") == Recipe()


@pytest.mark.parametrize(
    ("form", "said"),
    [
        (FastV, r"recipe=FastV: is a class; make a method of it: FastV\(\)"),
        ({"fastv": {}, "scope": {}}, "a dict of 2 names; write several methods as a list"),
        ({}, "recipe: {} is no method"),
        ([3], "recipe=3: must be a Recipe"),
        (None, "recipe=None: must be a Recipe"),
        ("lost.yaml", "recipe file 'lost.yaml': cannot be read"),
        (Path("lost"), "recipe file 'lost': cannot be read"),
    ],
)
def test_what_is_no_recipe_or_could_be_two_is_refused_by_name(form: object, said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        Recipe.of(form)  # type: ignore[arg-type]


def test_a_folder_that_is_named_like_a_repository_is_ambiguous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "tune").mkdir(parents=True)
    with pytest.raises(
        FoveateError, match="'out/tune': is a folder here and could be a name on the Hub; write 'out/tune/rec"
    ):
        Recipe.of("out/tune")
