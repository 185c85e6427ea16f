"""The two small statistics behind the table: an interval for a score, and a test of one method against another."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt

_Z = 1.959963984540054
"""Two-sided 95 % point of the normal distribution."""


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % Wilson interval of a share; for scores between 0 and 1 that are no plain hits it errs on the wide side."""
    if n == 0:
        return 0.0, 1.0
    share = successes / n
    spread = _Z * sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2))
    middle = share + _Z**2 / (2 * n)
    scale = 1 + _Z**2 / n
    # At the ends the formula gives the ends themselves, up to rounding.
    low = (middle - spread) / scale if successes > 0 else 0.0
    high = (middle + spread) / scale if successes < n else 1.0
    return low, high


def beats(scores: Sequence[float], others: Sequence[float]) -> bool:
    """Whether ``scores`` are better than ``others`` on the same questions beyond noise (sign test, 95 %).

    The same questions make the comparison sharper than two intervals side by side: only those count that one of the two
    answers better.
    """
    won = sum(a > b for a, b in zip(scores, others, strict=True))
    lost = sum(a < b for a, b in zip(scores, others, strict=True))
    return wilson(won, won + lost)[0] > 0.5
