from __future__ import annotations

import warnings

import optuna
import pytest

from foveate.bench.probes import Hints
from foveate.core import registry
from foveate.core.recipe import Recipe
from foveate.core.traits import Traits
from foveate.tune.hints import first_recipes
from foveate.tune.space import Space
from tests.methods.bodiless import traits
from tests.thirdparty import installed

LLAVA = traits()
"""32 decoder layers."""


def draw(space: Space, seed: int) -> Recipe:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=seed))
    return space.suggest(study.ask())


def redrawn(space: Space, recipe: Recipe) -> Recipe:
    """What comes out of a trial that is given the recipe's parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        study = optuna.create_study()
        study.enqueue_trial(space.parameters(recipe))
        trial = study.ask()
        found = space.suggest(trial)
    assert set(trial.params) == set(space.parameters(recipe))
    return found


@pytest.mark.parametrize("name", registry.methods())
@pytest.mark.parametrize("model", [LLAVA, traits(decoder_layers=8, encoder_layers=7)], ids=["32 layers", "8 layers"])
def test_every_draw_is_a_recipe_that_can_be_written_and_drawn_again(name: str, model: Traits) -> None:
    space = Space.of([name], model)

    for seed in range(20):
        recipe = draw(space, seed)
        assert Recipe.parse(str(recipe)) == recipe == Recipe.from_yaml(recipe.to_yaml())
        assert redrawn(space, recipe) == recipe


@pytest.mark.parametrize("name", ["fastv", "feather", "v2drop", "transprune", "ivc_prune", "hiprune", "prumerge"])
def test_layers_are_those_that_the_model_has(name: str) -> None:
    space = Space.of([name], traits(decoder_layers=5, encoder_layers=7))

    for seed in range(20):
        (method,) = draw(space, seed).methods
        layers = next(getattr(method, field) for field in ("layer", "layers", "object_layer") if hasattr(method, field))
        depth = 7 if method.group == "before_llm" else 5
        drawn = layers if isinstance(layers, tuple) else (layers,)
        assert all(layer is None or 1 <= layer < depth for layer in drawn)


def test_the_budget_layers_and_switches_of_a_method_are_searched() -> None:
    recipes = [draw(Space.of(["fastv", "cdpruner"], LLAVA), seed).methods[0] for seed in range(40)]

    fastv = [method for method in recipes if method.name == "fastv"]
    assert len({method.keep for method in fastv}) > 5
    assert len({method.layer for method in fastv}) > 5
    assert {method.negate for method in recipes if method.name == "cdpruner"} == {True, False}


def test_what_a_method_declares_is_searched_and_a_single_value_holds_fast() -> None:
    assert {draw(Space.of(["snapkv"], LLAVA), seed).methods[0].window for seed in range(30)} == {8, 16, 32, 64}
    assert {draw(Space.of(["alvts"], LLAVA), seed).methods[0].rope for seed in range(30)} == {False}


def test_each_view_gets_a_rate_where_prompts_have_several() -> None:
    rates = [
        [draw(Space.of(["prune2drive"], LLAVA, pictures=n), seed).methods[0].rates for seed in range(30)] for n in (1, 3, 9)
    ]

    assert set(rates[0]) == {()}
    assert {len(each) for each in rates[1]} == {0, 3}
    assert {len(each) for each in rates[2]} == {0, 6}
    assert all(0.1 <= rate <= 1 for each in rates[1] for rate in each)
    assert len({rate for each in rates[1] for rate in each}) > 20


def test_the_rates_of_views_are_drawn_again() -> None:
    space = Space.of(["prune2drive", "snapkv"], LLAVA, compose=True, pictures=3)

    assert all(redrawn(space, draw(space, seed)) == draw(space, seed) for seed in range(20))
    assert redrawn(space, Recipe.parse("prune2drive(keep=0.5)")) == Recipe.parse("prune2drive(keep=0.5)")


def test_the_search_finds_the_view_that_counts() -> None:
    space = Space.of(["prune2drive"], LLAVA, pictures=3)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=0))
    for _ in range(120):
        trial = study.ask()
        (method,) = space.suggest(trial).methods
        rates = method.rates or (method.keep,) * 3
        study.tell(trial, 0.3 * sum(rates) - rates[0])
    (best,) = space.suggest(optuna.trial.FixedTrial(study.best_trial.params)).methods

    assert best.rates[0] > 0.9
    assert max(best.rates[1:]) < 0.2


def test_a_third_partys_method_is_searched() -> None:
    with installed():
        recipes = {str(draw(Space.of(["stripes"], LLAVA), seed)) for seed in range(10)}

    assert len(recipes) > 1


def test_pairs_act_one_behind_the_other() -> None:
    space = Space.of(["snapkv", "fastv", "hiprune", "uniform"], LLAVA, compose=True)

    pairs = [[method.group for method in draw(space, seed).methods] for seed in range(60)]

    assert {tuple(pair) for pair in pairs if len(pair) == 2} == {
        ("before_llm", "in_llm"),
        ("before_llm", "kv_cache"),
        ("in_llm", "kv_cache"),
    }
    assert all(redrawn(space, draw(space, seed)) == draw(space, seed) for seed in range(20))


def test_hints_come_first() -> None:
    space = Space.of(["fastv", "uniform", "snapkv"], LLAVA)

    first = [str(recipe) for recipe in first_recipes(space, Hints(horizon=9, dead_share=0.4), starts=(0.5, 0.7))]

    assert first == [
        "fastv(layer=9, keep=0.05)",
        "uniform(keep=0.6)",
        "snapkv(keep=0.6)",
        "fastv(keep=0.5)",
        "uniform(keep=0.5)",
        "snapkv(keep=0.5)",
        "snapkv(keep=0.5, window=8)",
        "snapkv(keep=0.5, window=16)",
        "snapkv(keep=0.5, window=32)",
        "fastv(keep=0.7)",
        "uniform(keep=0.7)",
        "snapkv(keep=0.7)",
    ]
