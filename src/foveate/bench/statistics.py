"""The statistics behind the tables: how sure a score is, and whether one method is better than another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import geometric_mean, median

import numpy as np

from foveate.core.errors import FoveateError
from foveate.core.statistics import wilson

RESAMPLES = 2000


@dataclass(frozen=True)
class Difference:
    """How much higher one mean is than another on the same questions, with its interval."""

    mean: float
    low: float
    high: float

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Ratio:
    """A ratio of two costs, each pair taken right beside each other, with its 95 % interval; None where one pair is all."""

    value: float
    low: float | None
    high: float | None


def ratio(pairs: Sequence[float]) -> Ratio:
    """The median of paired ratios, with its bootstrap interval: of three pairs or fewer that is their range."""
    return ratio_over([pairs])


def ratio_over(groups: Sequence[Sequence[float]], seed: int = 0) -> Ratio:
    """The geometric mean over groups (tasks) of the median of each group's paired ratios, with its bootstrap interval.

    Groups are drawn anew and so are the pairs in each, so the interval covers the noise of the clock and, where there are
    several groups, how much they differ.
    """
    value = geometric_mean(median(pairs) for pairs in groups)
    if sum(map(len, groups)) < 2:
        return Ratio(value, None, None)
    rng, count = np.random.default_rng(seed), len(groups)
    # A group that is drawn twice has its pairs drawn twice.
    medians = [np.median(rng.choice(pairs, (RESAMPLES, count, len(pairs))), axis=2) for pairs in groups]
    drawn = np.take_along_axis(np.stack(medians), rng.integers(count, size=(1, RESAMPLES, count)), axis=0)[0]
    low, high = np.quantile(np.exp(np.log(drawn).mean(axis=1)), (0.025, 0.975))
    return Ratio(value, min(float(low), value), max(float(high), value))


def retained(groups: Sequence[tuple[Sequence[float], Sequence[float]]], seed: int = 0) -> Ratio:
    """The mean over groups (benchmarks) of what is left of a mean score, with its 95 % interval.

    A group has the scores of the same questions with and without a recipe; questions are drawn anew in pairs.

    Raises:
        FoveateError: if the unmodified model scores nothing on one.
    """
    pairs = [(np.asarray(scores, float), np.asarray(base, float)) for scores, base in groups]
    if not all(base.mean() > 0 for _, base in pairs):
        raise FoveateError("score: the unmodified model scores 0, so no share of it is kept; ask other questions, or more")
    value = float(np.mean([scores.mean() / base.mean() for scores, base in pairs]))
    rng, drawn = np.random.default_rng(seed), np.zeros(RESAMPLES)
    for scores, base in pairs:
        for draw in range(RESAMPLES):
            index = rng.integers(len(base), size=len(base))
            # A draw in which nothing is answered says nothing of a share.
            drawn[draw] += scores[index].sum() / total if (total := base[index].sum()) else np.nan
    low, high = np.nanquantile(drawn / len(pairs), (0.025, 0.975))
    return Ratio(value, min(float(low), value), max(float(high), value))


def interval(scores: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean score: Wilson's where every score is 0 or 1, the bootstrap's otherwise."""
    if all(score in (0, 1) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap(scores, ends=(0, 1))


def difference(scores: Sequence[float], others: Sequence[float], level: float = 0.95) -> Difference:
    """How much higher ``scores`` are than ``others`` on the same questions: paired bootstrap.

    The same questions make the comparison sharper than two intervals side by side: what is hard for both does not count.
    """
    pairs = np.asarray(scores, float) - np.asarray(others, float)
    low, high = bootstrap(pairs, ends=(-1, 1), level=level)
    return Difference(float(pairs.mean()), low, high)


def beats(scores: Sequence[float], others: Sequence[float]) -> bool:
    """Whether ``scores`` are better than ``others`` on the same questions beyond noise."""
    return difference(scores, others).low > 0


def bootstrap(
    values: Sequence[float] | np.ndarray, ends: tuple[float, float], seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of a mean, by drawing as many ``values`` as there are again and again.

    One imagined value is drawn from as well, half of it at each of the ``ends`` of the scale: that none of 100 answers
    changed does not show that none ever will, but by itself the bootstrap would say so. It adds about 2/n to an interval
    without width and next to nothing to others.
    """
    distinct, counts = np.unique(np.asarray(values, float), return_counts=True)
    n = int(counts.sum())
    drawn = np.concatenate([distinct, ends])
    shares = np.concatenate([counts, (0.5, 0.5)]) / (n + 1)
    # Distinct values drawn by their shares are what n draws with replacement come to.
    means = np.random.default_rng(seed).multinomial(n, shares, size=RESAMPLES) @ drawn / n
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2))
    middle = float(np.mean(values))
    return min(float(low), middle), max(float(high), middle)
