"""Stripes: keep every n-th column of the grid, for nothing more than an example of a package with a method of its own."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.positions import Positions
from foveate.core.registry import register


@register
@dataclass(frozen=True)
class Stripes(ItemTokens):
    """Keep every n-th column of the grid; if the budget allows for more, the columns beside those."""

    name = "stripes"
    title = "Stripes"
    group = "before_llm"
    paper = "none"
    helps = "Never: it is an example."

    keep: int | float = 0.5
    every: int = 2
    """Columns from one that stays to the next."""
    positions: Positions = "auto"

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Whole columns first, then raster order."""
        beside = images.ordinal % images.columns % self.every
        return beside.argsort(dim=1, stable=True)[:, :k].sort(dim=1).values
