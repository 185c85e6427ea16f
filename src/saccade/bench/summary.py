"""What the records say when they are put together: means over tasks, and which methods do no better than chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from saccade.bench.cells import REFERENCE_POINTS, Keep, keep_text
from saccade.bench.folder import ResultFolder
from saccade.bench.records import Record
from saccade.bench.statistics import beats
from saccade.core.recipe import NONE


@dataclass(frozen=True)
class Mean:
    """A method at a budget over all tasks that it has in common with the unmodified model; None where undefined.

    ``tasks`` is how many these are; ``speedup`` is the geometric mean over them.
    """

    method: str
    keep: Keep
    tasks: int
    score: float
    retention: float | None
    evidence_recall: float | None
    visual_tokens: float | None
    speedup: float
    efficiency: float | None
    kv_bytes: float | None


def means(records: Sequence[Record], speedup: Callable[[Record], float]) -> list[Mean]:
    """One mean for each method and budget, in order of first appearance."""
    comparable = {record.task for record in records if record.method == NONE}
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        if record.task in comparable:
            groups.setdefault(record.key[1:], []).append(record)
    return [_mean(group, speedup) for group in groups.values()]


def _mean(group: list[Record], speedup: Callable[[Record], float]) -> Mean:
    def over_tasks(value: Callable[[Record], float | None]) -> float | None:
        known = [number for record in group if (number := value(record)) is not None]
        return fmean(known) if known else None

    return Mean(
        method=group[0].method,
        keep=group[0].keep,
        tasks=len(group),
        score=fmean(record.score for record in group),
        retention=over_tasks(lambda record: record.retention),
        evidence_recall=over_tasks(lambda record: record.evidence_recall),
        visual_tokens=over_tasks(lambda record: record.visual_tokens),
        speedup=geometric_mean(map(speedup, group)),
        efficiency=over_tasks(lambda record: record.efficiency),
        kv_bytes=over_tasks(lambda record: record.kv_bytes),
    )


def no_better_than_random(folder: ResultFolder, records: Iterable[Record]) -> list[Record]:
    """The records that do not beat ``random`` with the same budget on the same questions beyond noise."""
    found = []
    for record in records:
        if record.method in REFERENCE_POINTS:
            continue
        random = folder.record((record.task, "random", keep_text(record.keep)))
        if random is not None and not beats(folder.scores(record), folder.scores(random)):
            found.append(record)
    return found
