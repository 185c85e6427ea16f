"""An interval for a share, wherever a score is reported."""

from __future__ import annotations

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
