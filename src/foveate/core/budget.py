"""How many tokens to keep."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from foveate.core.errors import FoveateError
from foveate.core.parameters import Keep

Rounding = Literal["round", "floor"]


@dataclass(frozen=True)
class Budget:
    """A number of tokens to keep, as a count (``int``) or a ratio (``float`` in (0, 1]).

    Cards differ in how a ratio becomes a count: ``"round"`` is Python's (half to even), ``"floor"`` truncates, ``"ceil"``
    rounds up.
    """

    keep: int | float
    rounding: Rounding | Literal["ceil"] = "round"

    def __post_init__(self) -> None:
        number = isinstance(self.keep, int | float) and not isinstance(self.keep, bool)
        if not (number and Keep().fits(self.keep)):
            raise FoveateError(f"keep={self.keep!r}: must be {Keep().words('a number')}")

    def of(self, count: int) -> int:
        """Tokens kept out of ``count``: never more than there are, and at least one where there is any."""
        if isinstance(self.keep, int):
            return min(self.keep, count)
        wanted = count * self.keep
        kept = round(wanted) if self.rounding == "round" else math.ceil(wanted) if self.rounding == "ceil" else int(wanted)
        return min(max(kept, 1), count)

    def across(self, counts: Sequence[int]) -> int:
        """Tokens kept of several layers together: a count is one of each, a ratio one of all, so that it is rounded once.

        One of each layer that has any, at least.
        """
        if isinstance(self.keep, int):
            return sum(map(self.of, counts))
        return max(self.of(sum(counts)), sum(count > 0 for count in counts))
