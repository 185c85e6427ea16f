"""What a recipe has shown: its answers beside those of the unmodified model, and what they cost beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean, median
from typing import Any

from foveate.bench.statistics import difference

COSTS = ("prefill", "ttft", "decode", "total", "kv")
"""The language model's prefill, the time to the first token with encoder and methods, a step of decoding, all of
``generate``, and the cache, which needs no clock."""

_NUMBERS = tuple[float, ...]


@dataclass(frozen=True)
class Answered:
    """Questions answered under a recipe.

    scores, kv: one number for each question; the bytes of its cache.
    ratios: for each timed cost, seconds over those of the unmodified model, for each batch that was timed under both.
    """

    scores: _NUMBERS = ()
    kv: _NUMBERS = ()
    ratios: dict[str, _NUMBERS] = field(default_factory=dict)

    def __add__(self, more: Answered) -> Answered:
        ratios = {cost: self.ratios.get(cost, ()) + more.ratios.get(cost, ()) for cost in {**self.ratios, **more.ratios}}
        return Answered(self.scores + more.scores, self.kv + more.kv, ratios)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Answered:
        """From what ``dataclasses.asdict`` made of it."""
        ratios = {cost: tuple(ratios) for cost, ratios in found["ratios"].items()}
        return cls(tuple(found["scores"]), tuple(found["kv"]), ratios)


@dataclass(frozen=True)
class Interval:
    """An estimate and how far down and up it may be off."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Evidence:
    """A recipe beside the unmodified model on the same questions.

    n: questions. score, unmodified: mean scores.
    drop: by how much the mean score is lower, with its paired 95 % interval.
    shares: of each cost, what it is of the unmodified model's: median and extremes of the timed batches.
    """

    n: int
    score: float
    unmodified: float
    drop: Interval
    shares: dict[str, Interval]

    @classmethod
    def of(cls, answered: Answered, unmodified: Answered) -> Evidence:
        """Compare answers with the unmodified model's, of which there may be more."""
        n = len(answered.scores)
        before, kv_before = unmodified.scores[:n], unmodified.kv[:n]
        shares = {cost: Interval(median(r), min(r), max(r)) for cost, r in answered.ratios.items() if r}
        kv = sum(answered.kv) / sum(kv_before)
        shares["kv"] = Interval(kv, kv, kv)
        drop = paired(before, answered.scores)
        return cls(n, fmean(answered.scores), fmean(before), drop, shares)

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Evidence:
        """From what ``dataclasses.asdict`` made of it."""
        shares = {cost: Interval(**share) for cost, share in found["shares"].items()}
        return cls(**{**found, "drop": Interval(**found["drop"]), "shares": shares})


def paired(scores: Sequence[float], others: Sequence[float], level: float = 0.95) -> Interval:
    """By how much ``scores`` are better than ``others`` on the same questions: mean and bootstrap interval."""
    found = difference(scores, others, level)
    return Interval(found.mean, found.low, found.high)
