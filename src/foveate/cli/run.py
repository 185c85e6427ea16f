"""``foveate run``: one picture, one question, without and with a recipe, again and again in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

import foveate
from foveate import checkpoint
from foveate.bench.machine import device_name
from foveate.bench.peak import Peak
from foveate.checkpoint import Checkpoint
from foveate.cli.console import output
from foveate.core.recipe import Recipe
from foveate.core.report import Report
from foveate.report.run_table import Answered, run_table
from foveate.tasks.pictures import read_picture

_ROUNDS, _SECONDS = 9, 15.0
"""So often each recipe answers at most, and so long after the start of the first round another one begins."""


def run(
    image: Path,
    prompt: str,
    recipe: str,
    model: str,
    max_new_tokens: int,
    seed: int,
    device: str,
    dtype: str,
    companion: str | None,
) -> None:
    """Answer and print the comparison."""
    picture = read_picture(image)
    wanted = read_recipe(recipe)
    device = checkpoint.resolve_device(device)
    loaded = checkpoint.load(model, device, checkpoint.resolve_dtype(dtype, device), companion)
    loaded.refuse_placeholders([prompt])
    inputs = loaded.inputs([[picture]], [prompt])
    recipes = list(dict.fromkeys((Recipe(), wanted)))
    runs = _answers(loaded, inputs, recipes, max_new_tokens, seed)
    output().print(run_table(runs, device_name(device), loaded.model.dtype))
    for line in runs[-1].reports[0].idle_lines():
        output().print(line, style="yellow")


def read_recipe(recipe: str) -> Recipe:
    """A recipe from text, or from a YAML file if it is named like one."""
    return Recipe.load(recipe) if recipe.endswith((".yaml", ".yml")) else Recipe.parse(recipe)


def _answers(
    loaded: Checkpoint, inputs: dict[str, Tensor], recipes: Sequence[Recipe], max_new_tokens: int, seed: int
) -> list[Answered]:
    """Each recipe's answer and what it cost each time; they take turns, so that all meet the machine in the same state."""

    def answer(recipe: Recipe, longest: int) -> tuple[str, Report, int | None]:
        peak = Peak(loaded.model)
        with foveate.attach(loaded.model, recipe, seed=seed, companion=loaded.companion) as session:
            return loaded.answer(inputs, longest)[0], session.report, peak.bytes()

    for recipe in recipes:
        # The first request of a shape pays for allocations and kernel choices.
        answer(recipe, min(2, max_new_tokens))
    rounds: list[list[tuple[str, Report, int | None]]] = []
    began = time.monotonic()
    while len(rounds) < _ROUNDS and (not rounds or time.monotonic() - began < _SECONDS):
        # Who comes first alternates, or what wears off would always favour one.
        order = recipes if len(rounds) % 2 == 0 else recipes[::-1]
        found = {recipe: answer(recipe, max_new_tokens) for recipe in order}
        rounds.append([found[recipe] for recipe in recipes])
    return [Answered(turns[0][0], [report for _, report, _ in turns], turns[0][2]) for turns in zip(*rounds, strict=True)]
