"""``foveate watch``: a video or a camera as a stream, and questions about what has come so far."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from foveate import checkpoint
from foveate.cli.console import output
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.streams import Stream, stream
from foveate.streams.frames import frames


@dataclass(frozen=True)
class WatchRequest:
    """The options of the command, as they were given."""

    video: str
    ask: Sequence[str]
    at: Sequence[float]
    recipe: str
    model: str
    fps: float
    chunk: int
    max_new_tokens: int
    seed: int
    device: str
    dtype: str
    artifacts: str | None
    model_args: str | None
    system: str | None


@quiet()
def watch(request: WatchRequest) -> None:
    """Read the video, and print an answer whenever a question is due."""
    if request.at and len(request.at) != len(request.ask):
        raise FoveateError(
            f"--at: {len(request.at)} times for {len(request.ask)} questions; give one for each --ask, or none (at the end)"
        )
    late = sorted(zip(request.at or [float("inf")] * len(request.ask), request.ask), key=lambda each: each[0])
    recipe = Recipe.of(request.recipe)
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    loaded = checkpoint.load(request.model, device, dtype, None, request.artifacts, arguments, request.system)
    with stream(loaded, recipe, chunk=request.chunk, seed=request.seed) as running:
        seconds = 0.0
        for seconds, frame in frames(request.video, request.fps):
            while late and late[0][0] < seconds:
                _answer(running, late.pop(0)[1], seconds, request.max_new_tokens)
            running.push(frame)
        for _, question in late:
            _answer(running, question, seconds, request.max_new_tokens)


def _answer(running: Stream, question: str, seconds: float, max_new_tokens: int) -> None:
    begun = time.perf_counter()
    answer = running.ask(question, max_new_tokens=max_new_tokens)
    took = time.perf_counter() - begun
    output().print(f"{seconds:8.1f} s  {question}", highlight=False, markup=False)
    output().print(f"            {answer}", style="bold", highlight=False, markup=False)
    cost = f"{running.frames} frames, {running.entries} entries, {running.nbytes / 2**20:.1f} MiB, answered in {took:.2f} s"
    output().print(f"            {cost}", style="dim", highlight=False, markup=False)
