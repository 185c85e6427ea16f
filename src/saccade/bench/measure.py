"""Measures one cell: answers its questions under a recipe and reads off what that cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

from torch import Tensor

import saccade
from saccade import reference
from saccade.bench.cells import Cell
from saccade.bench.checkpoint import Checkpoint
from saccade.bench.folder import Settings
from saccade.bench.records import Answer, Measurement
from saccade.core.recipe import NONE
from saccade.core.report import Report
from saccade.engine import oracle

MAX_NEW_TOKENS = 16
"""Tokens an answer may have; the longest right one has four words."""

COMPARED_BATCHES = 3
"""Batches on which the physical limit and the unmodified model are timed as well."""

Questions = Sequence[reference.Question]


@dataclass(frozen=True)
class _Batch:
    """One batch as it was answered, and what the same prefill takes at the physical limit and unmodified, if timed."""

    answers: list[Answer]
    visual_tokens: int
    report: Report
    limit_seconds: float | None = None
    unmodified_seconds: float | None = None


def measure(
    checkpoint: Checkpoint, settings: Settings, cell: Cell, questions: Questions, advance: Callable[[int], None]
) -> Measurement:
    """Answer ``questions`` under the cell's recipe; ``advance`` is told how many more are answered."""
    size = settings.batch_size
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    _warm_up(checkpoint, cell, batches[0])
    done: list[_Batch] = []
    for number, batch in enumerate(batches):
        # A session for each batch: comparisons are timed between them, and methods that draw do not stake all on one draw.
        seed = settings.seed * len(batches) + number
        done.append(_answer(checkpoint, cell, batch, seed, compare=number < COMPARED_BATCHES))
        advance(len(batch))
    return _summarise(done)


def evidence_recall(question: reference.Question, grid: tuple[int, int], alive: Tensor) -> float | None:
    """Share of the question's evidence cells among the visual tokens ``alive`` (raster indices); None without evidence."""
    cells = reference.evidence_cells(question.evidence, *grid).ravel()
    return float(cells[alive.cpu().numpy()].sum() / cells.sum()) if cells.any() else None


def _warm_up(checkpoint: Checkpoint, cell: Cell, batch: Questions) -> None:
    """Answer a batch for nothing: the first of a shape pays for allocations and kernel choices."""
    with saccade.attach(checkpoint.model, cell.recipe, companion=checkpoint.companion):
        checkpoint.answer(_inputs(checkpoint, batch), max_new_tokens=2)


def _answer(checkpoint: Checkpoint, cell: Cell, batch: Questions, seed: int, *, compare: bool) -> _Batch:
    inputs = _inputs(checkpoint, batch)
    with saccade.attach(checkpoint.model, cell.recipe, seed=seed, companion=checkpoint.companion) as session:
        predictions = checkpoint.answer(inputs, MAX_NEW_TOKENS)
    report, grids, alive = session.report, session.trace.grids, session.trace.alive(checkpoint.layers - 1)
    answered = _Batch(
        answers=[
            Answer(q.prompt, q.answer, prediction, reference.score(q, prediction), evidence_recall(q, grid[0], kept[0]))
            for q, prediction, grid, kept in zip(batch, predictions, grids, alive, strict=True)
        ],
        visual_tokens=sum(len(item) for items in alive for item in items),
        report=report,
    )
    if not compare:
        return answered
    # Right after the run that they are compared with, so that all meet the machine in the same state.
    limit = oracle.prefill_seconds(checkpoint.model, report, repeats=1)
    with saccade.attach(checkpoint.model, NONE) as unmodified:
        checkpoint.answer(inputs, max_new_tokens=1)
    return replace(answered, limit_seconds=limit, unmodified_seconds=unmodified.report.prefill_seconds)


def _inputs(checkpoint: Checkpoint, batch: Questions) -> dict[str, Tensor]:
    return checkpoint.inputs([question.image for question in batch], [question.prompt for question in batch])


def _summarise(batches: Sequence[_Batch]) -> Measurement:
    # A last batch that is smaller takes less time.
    timed = [batch for batch in batches if len(batch.answers) == len(batches[0].answers)]
    decode = [batch.report.decode_seconds / steps for batch in timed if (steps := batch.report.decode_steps)]
    limits = [batch.limit_seconds / batch.report.prefill_seconds for batch in timed if batch.limit_seconds]
    speedups = [batch.unmodified_seconds / batch.report.prefill_seconds for batch in timed if batch.unmodified_seconds]
    answers = [answer for batch in batches for answer in batch.answers]
    return Measurement(
        answers=answers,
        visual_tokens=sum(batch.visual_tokens for batch in batches) / len(answers),
        prefill_seconds=median(batch.report.prefill_seconds for batch in timed),
        decode_seconds=median(decode) if decode else None,
        efficiency=median(limits),
        speedup=median(speedups),
        kv_bytes=sum(sum(batch.report.kv_bytes) for batch in batches) / len(answers),
    )
