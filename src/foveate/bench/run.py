"""Runs the cells of a plan one after the other; what fails is reported and the rest goes on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, Protocol

from foveate.bench.cells import Cell
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.records import RATIOS, Failure, Measurement, Record
from foveate.bench.statistics import interval, ratio
from foveate.core.recipe import Recipe
from foveate.tasks import Question

Measure = Callable[[Cell, Sequence[Question], Callable[[int], None]], Measurement]
"""Measures a cell on its questions and tells how many more are answered."""


class Host(Protocol):
    """A model that measures cells, and can say what it refuses."""

    def __call__(self, cell: Cell, questions: Sequence[Question], advance: Callable[[int], None]) -> Measurement:
        """Measure a cell, as `Measure`."""

    def refusals(self, recipes: Sequence[Recipe]) -> Sequence[str | None]:
        """Why it does not take each of the recipes; None where it does."""


Ask = Callable[[str], Sequence[Question]]
"""The questions of a task; can be pickled, because a bench on Ray asks in its workers."""


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


def run(cells: Sequence[Cell], ask: Ask, measure: Measure, folder: ResultFolder, watcher: Watcher) -> None:
    """Measure the cells that ``folder`` does not hold yet and keep each as soon as it is finished."""
    folder.begin(cells)
    examine = Examiner(ask, measure)
    for cell in cells:
        if not folder.finished(cell):
            watcher.started(cell)
            settle(cell, examine(cell, watcher.advanced), folder, watcher)


class Examiner:
    """Measures cells on the questions of their tasks, whatever becomes of them."""

    def __init__(self, ask: Ask, measure: Measure) -> None:
        self._ask = ask
        self._measure = measure
        self._asked: dict[str, Sequence[Question]] = {}

    def __call__(self, cell: Cell, advance: Callable[[int], None]) -> Measurement | Failure:
        """The measurement of a cell, or what it died of."""
        try:
            if cell.task not in self._asked:
                # One task at a time: pictures are large, and the plan goes task by task.
                self._asked = {cell.task: self._ask(cell.task)}
            return self._measure(cell, self._asked[cell.task], advance)
        # A cell may die of anything, also of a bug in a third-party method; the others are not to blame.
        except Exception as error:
            return Failure.of(cell, error)


def settle(cell: Cell, outcome: Measurement | Failure, folder: ResultFolder, watcher: Watcher) -> None:
    """Keep what was measured, report what failed."""
    if isinstance(outcome, Measurement):
        try:
            record = _record(cell, outcome, folder.settings)
            folder.keep(record, outcome)
        # Numbers that are none, and disks that are full.
        except Exception as error:
            outcome = Failure.of(cell, error)
        else:
            watcher.finished(record)
            return
    folder.report(outcome)
    watcher.failed(outcome)


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
        kv_bytes=measurement.kv_bytes,
        batch=measurement.batch,
        first_token_seconds=measurement.first_token_seconds,
        total_seconds=measurement.total_seconds,
        peak_bytes=measurement.peak_bytes,
        **_ratios(measurement),
    )


def _ratios(measurement: Measurement) -> dict[str, Any]:
    """The ratios of a record and the ends of their intervals, by the names of its fields."""
    found: dict[str, Any] = {}
    for name in RATIOS:
        each = ratio(measurement.pairs[name])
        found |= {name: each.value, f"{name}_low": each.low, f"{name}_high": each.high}
    return found
