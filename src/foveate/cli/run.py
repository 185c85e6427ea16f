"""``foveate run``: one question, mostly with a picture, without and with a recipe, again and again in turn."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from foveate import checkpoint
from foveate.bench.machine import device_name
from foveate.bench.peak import Peak
from foveate.checkpoint import Checkpoint
from foveate.cli.console import output
from foveate.cli.pictures import picture
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.report import Report
from foveate.report.run_table import Answered, run_table

_ROUNDS, _SECONDS = 9, 15.0
"""So often each recipe answers at most, and so long after the start of the first round another one begins."""


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
    artifacts: str | None
    model_args: str | None
    system: str | None


@quiet()
def run(request: RunRequest) -> None:
    """Answer and print the comparison."""
    pictures = [picture(name) for name in request.images]
    wanted = Recipe.of(request.recipe)
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    beside = (request.companion, request.artifacts, arguments, request.system)
    loaded = checkpoint.load(request.model, device, dtype, *beside)
    if not pictures and loaded.traits.sees:
        raise FoveateError("image: give one; prompts without are for text models, such as --model smol")
    loaded.refuse_placeholders([request.prompt])
    recipes = list(dict.fromkeys((Recipe(), wanted)))
    runs = _answers(loaded, pictures, request.prompt, recipes, request.max_new_tokens, request.seed)
    output().print(run_table(runs, device_name(device), loaded.model.dtype))
    last = runs[-1].reports[-1]
    for line in last.weight_lines():
        output().print(f"weights: {line}")
    for line in last.idle_lines():
        output().print(line, style="yellow")


def _answers(
    loaded: Checkpoint,
    pictures: Sequence[Image.Image],
    prompt: str,
    recipes: Sequence[Recipe],
    max_new_tokens: int,
    seed: int,
) -> list[Answered]:
    """Each recipe's answer and what it cost each time; they take turns, so that all meet the machine in the same state."""

    def answer(recipe: Recipe, longest: int) -> tuple[str, Report, int | None]:
        peak = Peak(loaded.model)
        with loaded.attach(recipe, seed) as session:
            return loaded.answer(loaded.inputs([pictures], [prompt], session), longest)[0], session.report, peak.bytes()

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
