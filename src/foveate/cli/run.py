"""``foveate run``: one picture, one question, without and with a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

import foveate
from foveate import checkpoint
from foveate.checkpoint import Checkpoint
from foveate.cli.console import output
from foveate.cli.pictures import picture
from foveate.cli.quiet import quiet
from foveate.core.recipe import Recipe
from foveate.report.run_table import Answered, run_table


@dataclass(frozen=True)
class RunRequest:
    """The options of the command, as they were given."""

    images: Sequence[str]
    prompt: str
    recipe: str
    model: str
    max_new_tokens: int
    seed: int
    device: str
    dtype: str
    companion: str | None
    model_args: str | None
    system: str | None


@quiet()
def run(request: RunRequest) -> None:
    """Answer and print the comparison."""
    pictures = [picture(name) for name in request.images]
    wanted = read_recipe(request.recipe)
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    loaded = checkpoint.load(request.model, device, dtype, request.companion, arguments, request.system)
    loaded.refuse_placeholders([request.prompt])
    inputs = loaded.inputs([pictures], [request.prompt])
    recipes = dict.fromkeys((Recipe(), wanted))
    answered = [_answer(loaded, inputs, each, request.max_new_tokens, request.seed) for each in recipes]
    output().print(run_table(answered))
    for line in answered[-1].report.idle_lines():
        output().print(line, style="yellow")


def read_recipe(recipe: str) -> Recipe:
    """A recipe from text, or from a YAML file if it is named like one."""
    return Recipe.load(recipe) if recipe.endswith((".yaml", ".yml")) else Recipe.parse(recipe)


def _answer(loaded: Checkpoint, inputs: dict[str, Tensor], recipe: Recipe, max_new_tokens: int, seed: int) -> Answered:
    with foveate.attach(loaded.model, recipe, seed=seed, companion=loaded.companion) as session:
        # The first request of a shape pays for allocations and kernel choices.
        loaded.answer(inputs, max_new_tokens=2)
        return Answered(loaded.answer(inputs, max_new_tokens)[0], session.report)
