"""Downsample: the picture is made smaller before the processor cuts it into patches.

Paper: "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression Methods", arXiv 2510.07143,
which finds that this beats many published methods, as most questions of common benchmarks do not need the detail. Sides are
scaled alike, and where the family rounds to more tokens than wanted, further by steps of 5 %. Bicubic, antialiased.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.method import Pictures
from foveate.core.parameters import Keep
from foveate.core.registry import register
from foveate.core.traits import Traits

STEP = 0.95
SMALLEST = 8
"""Pixels of the shorter side below which no smaller picture is tried."""


@register
@dataclass(frozen=True)
class Downsample(Pictures):
    """Make each picture so small that the model's own grid has only a part of the visual tokens."""

    name = "downsample"
    title = "Downsampling"
    group = "before_encoder"
    paper = "baseline"
    helps = "As a baseline, and wherever a smaller picture will do: the encoder has less to do as well."
    needs = ("pictures by `session.pictures`", "a grid that grows with the picture")
    identity_at = {"most": 1.0}  # noqa: RUF012
    budgeted = "most"

    most: Annotated[int | float, Keep()] = 0.25
    """Visual tokens that may be left of a picture, those of all its tiles together: the picture is made so small that the
    model's own grid has no more.
    """

    def check(self, traits: Traits) -> str | None:
        """A grid that does not depend on the picture cannot be made smaller so."""
        if traits.one_grid:
            return f"{traits.family} makes the same grid of every picture, whatever its size; use pool"
        return None

    def resize(self, size: tuple[int, int], tokens: Callable[[tuple[int, int]], int]) -> tuple[int, int]:
        """Scale both sides by the root of the share, then down until the grid is small enough."""
        whole = tokens(size)
        most = Budget(self.most, "floor").of(whole)
        if whole <= most:
            return size
        scale, least = math.sqrt(most / whole), whole
        while min(size) * scale >= min(SMALLEST, *size):
            smaller = (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1))
            least = min(least, tokens(smaller))
            if least <= most:
                return smaller
            scale *= STEP
        raise FoveateError(
            f"{self.name}: most={self.most!r}: allows {most} of the {whole} tokens of a picture of {size[1]} x {size[0]} "
            f"pixels, and the model makes {least} or more of any smaller one; allow as many, or use pool"
        )
