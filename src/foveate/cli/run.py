"""``foveate run``: one picture, one question, without and with a recipe."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from foveate import checkpoint
from foveate.checkpoint import Checkpoint
from foveate.cli.console import output
from foveate.core.recipe import Recipe
from foveate.report.run_table import Answered, run_table
from foveate.tasks.pictures import read_picture


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
    artifacts: str | None,
) -> None:
    """Answer and print the comparison."""
    picture = read_picture(image)
    wanted = read_recipe(recipe)
    device = checkpoint.resolve_device(device)
    loaded = checkpoint.load(model, device, checkpoint.resolve_dtype(dtype, device), companion, artifacts)
    loaded.refuse_placeholders([prompt])
    inputs = loaded.inputs([[picture]], [prompt])
    recipes = dict.fromkeys((Recipe(), wanted))
    answered = [_answer(loaded, inputs, each, max_new_tokens, seed) for each in recipes]
    output().print(run_table(answered))
    for line in answered[-1].report.idle_lines():
        output().print(line, style="yellow")


def read_recipe(recipe: str) -> Recipe:
    """A recipe from text, or from a YAML file if it is named like one."""
    return Recipe.load(recipe) if recipe.endswith((".yaml", ".yml")) else Recipe.parse(recipe)


def _answer(loaded: Checkpoint, inputs: dict[str, Tensor], recipe: Recipe, max_new_tokens: int, seed: int) -> Answered:
    with loaded.attach(recipe, seed) as session:
        # The first request of a shape pays for allocations and kernel choices.
        loaded.answer(inputs, max_new_tokens=2)
        return Answered(loaded.answer(inputs, max_new_tokens)[0], session.report)
