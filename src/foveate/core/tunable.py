"""What a method says about the search for its hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``: whole ones if both ends are, evenly on a logarithmic scale if ``log``."""

    low: int | float
    high: int | float
    log: bool = False


Tunable = Range | tuple[Any, ...]
"""A range, or the values to choose from (numbers, words, truth values); a single one holds the parameter fast."""
