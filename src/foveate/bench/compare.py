"""Two results side by side: where both answered the same questions, which answered better?"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from foveate.bench.cells import REFERENCE_POINTS
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.statistics import Difference, difference
from foveate.core.errors import FoveateError

_SAME = ("n", "seed", "digest", "metric", "short")
"""Settings that say which questions were asked and what counted as right."""

Pick = tuple[str, str]
"""A method and its budget as text."""


@dataclass(frozen=True)
class Side:
    """The folder of a bench, and the one method and budget in it to look at; all if None."""

    results: Results
    pick: Pick | None = None

    @classmethod
    def parse(cls, text: str) -> Side:
        """From ``DIR``, ``DIR:method@keep`` or, for a method without a budget, ``DIR:method``."""
        folder, method = (text, "") if Path(text).exists() else text.rpartition(":")[::2]
        if not folder:
            raise FoveateError(f"folder={text!r}: no such folder; must be that of a bench, or DIR:method@keep")
        path = Path(folder)
        results = Results.open(path.parent if path.name == "results.json" else path)
        if not method:
            return cls(results)
        name, _, keep = method.rpartition("@") if "@" in method else (method, "", "")
        found = dict.fromkeys(record.key[1:] for record in results.records)
        if (name, keep) not in found:
            there = ", ".join("@".join(filter(None, each)) for each in found)
            raise FoveateError(f"{method!r}: was not measured in {folder!r}; there are {there or 'no finished cells'}")
        return cls(results, (name, keep))

    def records(self, pick: Pick | None) -> list[Record]:
        """Those of one method and budget; all if None."""
        return [record for record in self.results.records if pick is None or record.key[1:] == pick]


@dataclass(frozen=True)
class Pair:
    """Two cells that answered the same questions; ``difference`` is how much higher ``b`` scores."""

    a: Record
    b: Record
    difference: Difference
    speedups: tuple[float | None, float | None]


@dataclass(frozen=True)
class TaskComparison:
    """The pairs of a task, and the ``difference`` over the ``judged`` ones: without the reference points, unless alone."""

    task: str
    pairs: tuple[Pair, ...]
    judged: int
    difference: Difference

    @property
    def verdict(self) -> str:
        """What that says of B."""
        if not self.difference.beyond_noise:
            return "no difference beyond noise"
        return "better" if self.difference.mean > 0 else "worse"


def compare(a: Side, b: Side) -> list[TaskComparison]:
    """Every task that both have, in A's order: cells of the same method and budget, or the two that were picked.

    A pick of one side alone holds for both.
    """
    _refuse_other_questions(a.results, b.results)
    of_a, of_b = a.records(a.pick or b.pick), b.records(b.pick or a.pick)
    key: Callable[[Record], object] = (lambda record: record.task) if a.pick or b.pick else (lambda record: record.key)
    partner = {key(record): record for record in of_b}
    pairs: dict[str, list[tuple[Record, Record]]] = {}
    for record in of_a:
        if key(record) in partner:
            pairs.setdefault(record.task, []).append((record, partner[key(record)]))
    if not pairs:
        raise FoveateError(
            f"{str(a.results.path)!r} and {str(b.results.path)!r} have no finished cell of the same task, method and "
            "budget; DIR:method@keep picks one of each"
        )
    return [_compare(task, each, a.results, b.results) for task, each in pairs.items()]


def _refuse_other_questions(a: Results, b: Results) -> None:
    for name in _SAME:
        one, other = getattr(a.settings, name), getattr(b.settings, name)
        if one != other:
            raise FoveateError(
                f"{name}={other!r}: {str(b.path)!r} cannot be paired with {str(a.path)!r}, which has {name}={one!r}; "
                "both must have answered the same questions"
            )


def _compare(task: str, cells: list[tuple[Record, Record]], a: Results, b: Results) -> TaskComparison:
    scores = [_scores(one, other, a, b) for one, other in cells]
    pairs = tuple(
        Pair(one, other, difference(of_b, of_a), (one.speedup, other.speedup))
        for (one, other), (of_a, of_b) in zip(cells, scores, strict=True)
    )
    judged = [each for (one, _), each in zip(cells, scores, strict=True) if one.method not in REFERENCE_POINTS] or scores
    # Questions are drawn, not answers: those that several methods gave to one question stay together.
    of_a, of_b = np.mean(judged, axis=0)
    return TaskComparison(task, pairs, len(judged), difference(of_b, of_a))


def _scores(one: Record, other: Record, a: Results, b: Results) -> tuple[list[float], list[float]]:
    of_a, of_b = a.answers(one), b.answers(other)
    if [(each.prompt, each.answer) for each in of_a] != [(each.prompt, each.answer) for each in of_b]:
        raise FoveateError(
            f"task={one.task!r}: {str(a.path)!r} and {str(b.path)!r} asked other questions and cannot be paired; "
            "measure again with one version"
        )
    return [each.score for each in of_a], [each.score for each in of_b]
