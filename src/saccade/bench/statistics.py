"""The test behind the table: is one method better than another?"""

from __future__ import annotations

from collections.abc import Sequence

from saccade.core.statistics import wilson


def beats(scores: Sequence[float], others: Sequence[float]) -> bool:
    """Whether ``scores`` are better than ``others`` on the same questions beyond noise (sign test, 95 %).

    The same questions make the comparison sharper than two intervals side by side: only those count that one of the two
    answers better.
    """
    won = sum(a > b for a, b in zip(scores, others, strict=True))
    lost = sum(a < b for a, b in zip(scores, others, strict=True))
    return wilson(won, won + lost)[0] > 0.5
