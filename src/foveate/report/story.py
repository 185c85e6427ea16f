"""What a bench says, before it is put into words: the winners, and who does no better than chance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from foveate.bench.cells import RANDOM, REFERENCE_POINTS, keep_text
from foveate.bench.records import Record
from foveate.bench.summary import Mean

LOSSES = (0.01, 0.02, 0.05, 0.10)
"""Shares of the score that a reader may be ready to give up."""

_PLACES = 3


@dataclass(frozen=True)
class Ranking:
    """The methods that retain most at a budget, best first, and what random selection retains with it."""

    keep: str
    best: tuple[Mean, ...]
    random: Mean | None


@dataclass(frozen=True)
class Offer:
    """The fastest that loses at most a share of the score; None where nothing is faster than the unmodified model."""

    loss: float
    fastest: Mean | None


def rankings(means: Sequence[Mean]) -> list[Ranking]:
    """One for each budget, in order of first appearance; methods without a budget compare with nothing."""
    random = {keep_text(mean.keep): mean for name in reversed(RANDOM) for mean in means if mean.method == name}
    found = []
    for keep in dict.fromkeys(keep_text(mean.keep) for mean in means if mean.keep is not None):
        group = [mean for mean in _contenders(means) if keep_text(mean.keep) == keep]
        if best := sorted(group, key=_retention, reverse=True)[:_PLACES]:
            found.append(Ranking(keep, tuple(best), random.get(keep)))
    return found


def offers(means: Sequence[Mean]) -> list[Offer]:
    """The fastest for each loss."""
    faster = [mean for mean in _contenders(means) if mean.speedup > 1]
    return [
        Offer(loss, max((m for m in faster if _retention(m) >= 1 - loss), key=lambda m: m.speedup, default=None))
        for loss in LOSSES
    ]


def by_method(records: Iterable[Record]) -> dict[str, dict[str, list[str]]]:
    """The budgets of each task of each method, those with most records first."""
    found: dict[str, dict[str, list[str]]] = {}
    for record in records:
        found.setdefault(record.method, {}).setdefault(record.task, []).append(keep_text(record.keep))
    return dict(sorted(found.items(), key=lambda entry: -sum(map(len, entry[1].values()))))


def _contenders(means: Sequence[Mean]) -> list[Mean]:
    """What may win: no point of reference, and nothing that was not measured on every task."""
    most = max((mean.tasks for mean in means), default=0)
    return [m for m in means if m.method not in REFERENCE_POINTS and m.tasks == most and m.retention is not None]


def _retention(mean: Mean) -> float:
    return mean.retention or 0.0
