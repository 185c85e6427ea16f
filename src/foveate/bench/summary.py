"""What the records say when they are put together: means over tasks, what was lost, and which methods are worth it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from foveate.bench.cells import RANDOM, REFERENCE_POINTS, Keep, Key, keep_text
from foveate.bench.folder import Results
from foveate.bench.records import SPEEDUPS, Record
from foveate.bench.statistics import Difference, beats, difference, ratio_over
from foveate.core.recipe import NONE

ALL_TASKS = ""
"""Stands for a task's name in a key: the method at the budget, over all tasks."""


@dataclass(frozen=True)
class Mean:
    """A method at a budget over all tasks that it has in common with the unmodified model; None where undefined.

    ``tasks`` is how many these are. The speed-ups are geometric means over them of what `Record` has, each with the ends of
    its 95 % interval over tasks and timed batches (`foveate.bench.statistics.ratio_over`). ``peak_bytes``: of the
    task that took most. ``retention_low`` and ``retention_high`` put the 95 % intervals of the tasks' scores together, the
    unmodified model's scores taken as they are.
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
    retention_low: float | None = None
    retention_high: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    first_token_speedup: float | None = None
    first_token_speedup_low: float | None = None
    first_token_speedup_high: float | None = None
    total_speedup: float | None = None
    total_speedup_low: float | None = None
    total_speedup_high: float | None = None
    decode_rate: float | None = None
    peak_bytes: float | None = None

    @property
    def key(self) -> Key:
        """What tells the means of a bench apart."""
        return ALL_TASKS, self.method, keep_text(self.keep)


def means(records: Sequence[Record], pairs: Callable[[Record], dict[str, list[float]]]) -> list[Mean]:
    """One mean for each method and budget, in order of first appearance; ``pairs`` are those of `Results.pairs`."""
    base = {record.task: record.score for record in records if record.method == NONE}
    return [_mean(group, [pairs(record) for record in group], base) for group in _over_tasks(records).values()]


def _over_tasks(records: Sequence[Record]) -> dict[Key, list[Record]]:
    """The records of each method and budget, on the tasks where the unmodified model was measured."""
    comparable = {record.task for record in records if record.method == NONE}
    groups: dict[Key, list[Record]] = {}
    for record in records:
        if record.task in comparable:
            groups.setdefault((ALL_TASKS, *record.key[1:]), []).append(record)
    return groups


def _mean(group: list[Record], pairs: Sequence[dict[str, list[float]]], base: Mapping[str, float]) -> Mean:
    def over_tasks(value: Callable[[Record], float | None]) -> float | None:
        known = [number for record in group if (number := value(record)) is not None]
        return fmean(known) if known else None

    retention = over_tasks(lambda record: record.retention)
    below, above = _margins(group, base)
    speedup, first_token, total = (ratio_over([each[name] for each in pairs]) for name in SPEEDUPS)
    return Mean(
        method=group[0].method,
        keep=group[0].keep,
        tasks=len(group),
        score=fmean(record.score for record in group),
        retention=retention,
        evidence_recall=over_tasks(lambda record: record.evidence_recall),
        visual_tokens=over_tasks(lambda record: record.visual_tokens),
        speedup=speedup.value,
        efficiency=over_tasks(lambda record: record.efficiency),
        kv_bytes=over_tasks(lambda record: record.kv_bytes),
        retention_low=None if retention is None else retention - below,
        retention_high=None if retention is None else retention + above,
        speedup_low=speedup.low,
        speedup_high=speedup.high,
        first_token_speedup=first_token.value,
        first_token_speedup_low=first_token.low,
        first_token_speedup_high=first_token.high,
        total_speedup=total.value,
        total_speedup_low=total.low,
        total_speedup_high=total.high,
        decode_rate=over_tasks(lambda record: record.decode_rate),
        peak_bytes=max((record.peak_bytes for record in group if record.peak_bytes is not None), default=None),
    )


def _margins(group: Sequence[Record], base: Mapping[str, float]) -> tuple[float, float]:
    """How far the interval of the mean retention reaches down and up; tasks are independent of each other."""
    known = [record for record in group if base[record.task]]
    below = math.hypot(*((record.score - record.score_low) / base[record.task] for record in known))
    above = math.hypot(*((record.score_high - record.score) / base[record.task] for record in known))
    return below / max(len(known), 1), above / max(len(known), 1)


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


def random_beside(folder: Results, record: Record) -> Record | None:
    """The cell of random selection that a record compares with: of the same budget on the same questions."""
    found = (folder.record((record.task, name, keep_text(record.keep))) for name in RANDOM)
    return next((random for random in found if random is not None), None)


def no_better_than_random(folder: Results, records: Iterable[Record]) -> list[Record]:
    """The records that do not beat random selection with the same budget on the same questions beyond noise."""
    found = []
    for record in records:
        if record.method in REFERENCE_POINTS:
            continue
        random = random_beside(folder, record)
        if random is not None and not beats(folder.scores(record), folder.scores(random)):
            found.append(record)
    return found
