"""Measures one cell: answers its questions under a recipe and reads off what that cost."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean, median

from torch import Tensor

from foveate.bench.cells import Cell
from foveate.bench.encodings import Encodings
from foveate.bench.examples import EXAMPLES, Picture, illustrate
from foveate.bench.folder import Settings
from foveate.bench.questions import ask
from foveate.bench.records import Answer, Measurement
from foveate.bench.run import Measure
from foveate.checkpoint import Checkpoint, load, resolve_device
from foveate.core.recipe import NONE, Recipe
from foveate.core.report import Report
from foveate.engine import limit
from foveate.engine.session import Session
from foveate.tasks import Question, evidence_cells

Questions = Sequence[Question]


@dataclass(frozen=True)
class _Batch:
    """One batch as it was answered, and what the same prefill takes at the physical limit and unmodified, if timed.

    ``visual``: visual tokens entering each layer, in all. ``recalls``: evidence recall of each question entering each layer.
    ``examples``: pictures of the first questions.
    """

    answers: list[Answer]
    visual: list[int]
    recalls: list[list[float | None]]
    examples: list[list[Picture]]
    report: Report
    limit_seconds: float | None = None
    unmodified_seconds: float | None = None


def measure_with(settings: Settings, task: str) -> Measure:
    """Load the model of ``settings`` and give what measures cells on it; ``task`` is one of theirs."""
    loaded = load(settings.model, resolve_device(settings.device), settings.dtype, settings.companion, settings.artifacts)
    if settings.data is not None:
        loaded.refuse_placeholders(turn.prompt for each in ask(settings, task) for turn in each.turns)
    return partial(measure, loaded, Encodings(loaded.model), settings)


def measure(
    checkpoint: Checkpoint,
    encodings: Encodings,
    settings: Settings,
    cell: Cell,
    questions: Questions,
    advance: Callable[[int], None],
) -> Measurement:
    """Answer ``questions`` under the cell's recipe; ``advance`` is told how many more are answered."""
    # A conversation goes on from its own answers, so each has a cache of its own.
    size = settings.batch_size if all(len(question.turns) == 1 for question in questions) else 1
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    encodings.about(cell.task)
    _warm_up(checkpoint, encodings, cell, batches[0])
    done: list[_Batch] = []
    for number, batch in enumerate(batches):
        # A session for each batch: comparisons are timed between them, and methods that draw do not stake all on one draw.
        seed = settings.seed * len(batches) + number
        shown = max(0, EXAMPLES - number * size)
        done.append(_answer(checkpoint, encodings, cell, batch, seed, shown, compare=number < settings.timed))
        advance(len(batch))
    return _summarise(done)


def evidence_recalls(
    question: Question, grids: Sequence[tuple[int, int]], layers: Sequence[Sequence[Tensor]]
) -> list[float | None]:
    """Share of the question's evidence cells among the visual tokens that enter each of ``layers``; None without evidence.

    ``grids`` and what is alive in a layer (raster indices) as in `foveate.core.report.Trace`: one or more for each picture,
    in order.
    """
    if not question.evidence or len(grids) % len(question.images):
        return [None] * len(layers)
    views, evidence = len(grids) // len(question.images), question.evidence
    cells = [evidence_cells(evidence[number // views], *grid).ravel() for number, grid in enumerate(grids)]
    shown = sum(int(each.sum()) for each in cells)
    seen = [sum(int(each[kept.cpu().numpy()].sum()) for each, kept in zip(cells, alive, strict=True)) for alive in layers]
    return [each / shown if shown else None for each in seen]


def _warm_up(checkpoint: Checkpoint, encodings: Encodings, cell: Cell, batch: Questions) -> None:
    """Answer a batch for nothing: the first of a shape pays for allocations and kernel choices."""
    with _attached(checkpoint, encodings, cell.recipe):
        checkpoint.answer(_inputs(checkpoint, batch), max_new_tokens=2)


def _answer(
    checkpoint: Checkpoint, encodings: Encodings, cell: Cell, batch: Questions, seed: int, shown: int, *, compare: bool
) -> _Batch:
    inputs, longest = _inputs(checkpoint, batch), batch[0].max_new_tokens
    with _attached(checkpoint, encodings, cell.recipe, seed) as session:
        if len(batch[0].turns) == 1:
            predictions = [[said] for said in checkpoint.answer(inputs, longest)]
        else:
            predictions = [checkpoint.converse(q.images, [turn.prompt for turn in q.turns], longest) for q in batch]
    report, trace = session.report, session.trace
    alive = [trace.alive(layer) for layer in range(checkpoint.layers)]
    recalls = [
        evidence_recalls(q, grids, [layer[b] for layer in alive]) for b, (q, grids) in enumerate(zip(batch, trace.grids))
    ]
    answered = _Batch(
        answers=[
            Answer(q.prompt, q.answer, "\n".join(said), q.score(said), recall[-1])
            for q, said, recall in zip(batch, predictions, recalls, strict=True)
        ],
        visual=[sum(len(tokens) for items in layer for tokens in items) for layer in alive],
        recalls=recalls,
        examples=[
            illustrate(q, grids, [layer[b] for layer in alive])
            for b, (q, grids) in enumerate(zip(batch[:shown], trace.grids))
        ],
        report=report,
    )
    if not compare:
        return answered
    # Right after the run that they are compared with, so that all meet the machine in the same state.
    seconds = limit.prefill_seconds(checkpoint.model, report, repeats=1)
    with _attached(checkpoint, encodings, NONE) as unmodified:
        checkpoint.answer(inputs, max_new_tokens=1)
    return replace(answered, limit_seconds=seconds, unmodified_seconds=unmodified.report.prefill_seconds)


@contextmanager
def _attached(checkpoint: Checkpoint, encodings: Encodings, recipe: Recipe | str, seed: int = 0) -> Iterator[Session]:
    with checkpoint.attach(recipe, seed) as session, encodings.serve(session):
        yield session


def _inputs(checkpoint: Checkpoint, batch: Questions) -> dict[str, Tensor]:
    return checkpoint.inputs([question.images for question in batch], [question.turns[0].prompt for question in batch])


def _summarise(batches: Sequence[_Batch]) -> Measurement:
    # A last batch that is smaller takes less time.
    timed = [batch for batch in batches if len(batch.answers) == len(batches[0].answers)]
    decode = [batch.report.decode_seconds / steps for batch in timed if (steps := batch.report.decode_steps)]
    limits = [batch.limit_seconds / batch.report.prefill_seconds for batch in timed if batch.limit_seconds]
    speedups = [batch.unmodified_seconds / batch.report.prefill_seconds for batch in timed if batch.unmodified_seconds]
    answers = [answer for batch in batches for answer in batch.answers]
    visual = [sum(layer) / len(answers) for layer in zip(*(batch.visual for batch in batches), strict=True)]
    cached = [sum(layer) / len(answers) for layer in zip(*(batch.report.kv_bytes for batch in batches), strict=True)]
    return Measurement(
        answers=answers,
        visual_tokens=visual[-1],
        prefill_seconds=median(batch.report.prefill_seconds for batch in timed),
        decode_seconds=median(decode) if decode else None,
        efficiency=median(limits),
        speedup=median(speedups),
        kv_bytes=sum(cached),
        visual_by_layer=visual,
        kv_by_layer=cached,
        evidence_by_layer=[_mean(layer) for layer in zip(*(recall for batch in batches for recall in batch.recalls))],
        examples=[pictures for batch in batches for pictures in batch.examples],
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
