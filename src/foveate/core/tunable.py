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


@dataclass(frozen=True)
class ByPicture:
    """A number from ``low`` to ``high`` for each picture of a prompt, for the first ``most`` at most; or none at all.

    For a parameter that is a tuple and () by default. Where prompts have one picture, it stays at that.
    """

    low: float
    high: float
    most: int


Tunable = Range | ByPicture | tuple[Any, ...]
"""A range, one for each picture, or the values to choose from (numbers, words, truth values); a single one holds the
parameter fast."""
