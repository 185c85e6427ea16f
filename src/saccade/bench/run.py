"""Runs the cells of a plan one after the other; what fails is reported and the rest goes on."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean
from typing import Protocol

from saccade.bench.cells import Cell
from saccade.bench.folder import ResultFolder, Settings
from saccade.bench.records import Failure, Measurement, Record
from saccade.bench.statistics import interval
from saccade.core.errors import SaccadeError
from saccade.tasks import Question

Measure = Callable[[Cell, Sequence[Question], Callable[[int], None]], Measurement]
"""Measures a cell on its questions and tells how many more are answered."""


Ask = Callable[[str], Sequence[Question]]
"""The questions of a task."""


class Watcher(Protocol):
    """Follows a run, to show it."""

    def started(self, cell: Cell) -> None:
        """A cell begins."""

    def advanced(self, questions: int) -> None:
        """So many more of its questions are answered."""

    def finished(self, record: Record) -> None:
        """It is measured and kept."""

    def failed(self, failure: Failure) -> None:
        """It raised."""


def run(cells: Iterable[Cell], ask: Ask, measure: Measure, folder: ResultFolder, watcher: Watcher) -> None:
    """Measure the cells that ``folder`` does not hold yet and keep each as soon as it is finished."""
    folder.begin()
    asked: dict[str, Sequence[Question]] = {}
    for cell in cells:
        if folder.finished(cell):
            continue
        watcher.started(cell)
        try:
            if cell.task not in asked:
                # One task at a time: pictures are large, and the plan goes task by task.
                asked = {cell.task: ask(cell.task)}
            measurement = measure(cell, asked[cell.task], watcher.advanced)
            record = _record(cell, measurement, folder.settings)
            folder.keep(record, measurement)
        # A cell may die of anything, also of a bug in a third-party method; the others are not to blame.
        except Exception as error:
            failure = Failure(cell, _one_line(error), traceback.format_exc())
            folder.report(failure)
            watcher.failed(failure)
        else:
            watcher.finished(record)


def _record(cell: Cell, measurement: Measurement, settings: Settings) -> Record:
    answers = measurement.answers
    score = fmean(answer.score for answer in answers)
    low, high = interval([answer.score for answer in answers])
    recalls = [answer.evidence_recall for answer in answers if answer.evidence_recall is not None]
    return Record(
        model=settings.model,
        task=cell.task,
        method=cell.method,
        keep=cell.keep,
        n=settings.n,
        seed=settings.seed,
        score=score,
        score_low=low,
        score_high=high,
        retention=None,
        evidence_recall=fmean(recalls) if recalls else None,
        visual_tokens=measurement.visual_tokens,
        prefill_seconds=measurement.prefill_seconds,
        decode_seconds=measurement.decode_seconds,
        efficiency=measurement.efficiency,
        kv_bytes=measurement.kv_bytes,
    )


def _one_line(error: Exception) -> str:
    message = " ".join(str(error).split())
    # What a user got wrong says so itself; of other errors the kind is half of the message.
    return message if isinstance(error, SaccadeError) else f"{type(error).__name__}: {message}".removesuffix(": ")
