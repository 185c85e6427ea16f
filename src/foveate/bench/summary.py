"""What the records say when they are put together: means over tasks, what was lost, and which methods are worth it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, geometric_mean

from foveate.bench.cells import REFERENCE_POINTS, Keep, Key, keep_text
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.statistics import Difference, beats, difference
from foveate.core.recipe import NONE

ALL_TASKS = ""
"""Stands for a task's name in a key: the method at the budget, over all tasks."""


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

    @property
    def key(self) -> Key:
        """What tells the means of a bench apart."""
        return ALL_TASKS, self.method, keep_text(self.keep)


def means(records: Sequence[Record], speedup: Callable[[Record], float]) -> list[Mean]:
    """One mean for each method and budget, in order of first appearance."""
    return [_mean(group, speedup) for group in _over_tasks(records).values()]


def _over_tasks(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """The records of each method and budget, on the tasks where the unmodified model was measured."""
    comparable = {record.task for record in records if record.method == NONE}
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record.task in comparable:
            groups.setdefault((ALL_TASKS, *record.key[1:]), []).append(record)
    return groups


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


def pareto(means: Sequence[Mean]) -> list[Mean]:
    """The means that no other beats: none is at least as fast and retains at least as much, and one of them more.

    Only means over the same tasks compare, so those that lack some are left out.
    """
    tasks = max((mean.tasks for mean in means), default=0)
    places = [(mean, (mean.speedup, mean.retention)) for mean in means if mean.tasks == tasks and mean.retention is not None]
    unbeaten = set(front([place for _, place in places]))
    return [mean for mean, place in places if place in unbeaten]


def front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Those of the points that no other is at least as good as in both numbers and better in one, by the first number."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(set(points), reverse=True):
        if not found or y > found[-1][1]:
            found.append((x, y))
    return found[::-1]


def drops(folder: Results, records: Sequence[Record]) -> dict[Key, Difference]:
    """How much lower each cell scores than the unmodified model on the same questions; also over `ALL_TASKS`.

    Only where that was measured.
    """
    scores = {record.key: folder.scores(record) for record in records}
    groups = {record.key: [record] for group in _over_tasks(records).values() for record in group} | _over_tasks(records)

    def drop(group: Sequence[Record]) -> Difference:
        # All tasks of a bench have as many questions, so that the mean over questions is the mean over tasks.
        plain = [score for record in group for score in scores[record.task, NONE, ""]]
        return difference(plain, [score for record in group for score in scores[record.key]])

    return {key: drop(group) for key, group in groups.items() if key[1] != NONE}


def kept_everything(records: Sequence[Record]) -> list[Record]:
    """The records whose ``keep`` is a count that no question of the task has more tokens than."""
    plain = {record.task: record for record in records if record.method == NONE}
    return [
        record
        for record in records
        if isinstance(record.keep, int)
        and (whole := plain.get(record.task)) is not None
        and (record.visual_tokens, record.kv_bytes) == (whole.visual_tokens, whole.kv_bytes)
    ]


def no_better_than_random(folder: Results, records: Iterable[Record]) -> list[Record]:
    """The records that do not beat ``random`` with the same budget on the same questions beyond noise."""
    found = []
    for record in records:
        if record.method in REFERENCE_POINTS:
            continue
        random = folder.record((record.task, "random", keep_text(record.keep)))
        if random is not None and not beats(folder.scores(record), folder.scores(random)):
            found.append(record)
    return found
