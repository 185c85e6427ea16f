"""How many tokens to keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from foveate.core.errors import FoveateError

Rounding = Literal["round", "floor"]


@dataclass(frozen=True)
class Budget:
    """A number of tokens to keep, as a count (``int``) or a ratio (``float`` in (0, 1]).

    Cards differ in how a ratio becomes a count: ``"round"`` is Python's (half to even), ``"floor"`` truncates, ``"ceil"``
    rounds up.
    """

    keep: int | float
    rounding: Rounding | Literal["ceil"] = "round"
    name: str = "keep"

    def __post_init__(self) -> None:
        keep = self.keep
        numeric = isinstance(keep, int | float) and not isinstance(keep, bool)
        if not numeric or not (keep >= 1 if isinstance(keep, int) else 0 < keep <= 1):
            raise FoveateError(
                f"{self.name}={keep!r}: must be a positive count (an integer such as 64) or a ratio in (0, 1]"
            )

    def of(self, count: int) -> int:
        """Tokens kept out of ``count``: never more than there are, and at least one where there is any."""
        if isinstance(self.keep, int):
            return min(self.keep, count)
        wanted = count * self.keep
        kept = round(wanted) if self.rounding == "round" else math.ceil(wanted) if self.rounding == "ceil" else int(wanted)
        return min(max(kept, 1), count)
