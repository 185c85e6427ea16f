"""Evenly spread visual tokens: what one gets for nothing, without looking at the picture.

Reconstructed: papers that compare with uniform sampling do not say how they spread tokens over a grid.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.positions import Positions
from foveate.core.registry import register


def stratified(rows: int, columns: int, k: int) -> Tensor:
    """``k`` cells of a grid as raster indices ``[k]``, ascending, spread evenly in both directions.

    The grid is cut into horizontal bands, about as many as make the spacing equal in both directions; each band gets its
    share of the ``k`` cells, evenly spaced along its middle row.
    """
    bands = min(rows, k, max(round(math.sqrt(k * rows / columns)), math.ceil(k / columns)))
    share = torch.arange(bands + 1) * k // bands
    band = torch.arange(bands).repeat_interleave(share.diff())
    nth = torch.arange(k) - share[band]
    y = ((2 * band + 1) * rows) // (2 * bands)
    x = ((2 * nth + 1) * columns) // (2 * share.diff()[band])
    return y * columns + x


@register
@dataclass(frozen=True)
class Uniform(ItemTokens):
    """Keep tokens spread evenly over each image's grid."""

    name = "uniform"
    title = "Uniform (stratified) selection"
    group = "before_llm"
    paper = "baseline"
    helps = "As a baseline, and as a choice that costs nothing and reads nothing."
    needs_grid = True

    keep: int | float = 0.25
    positions: Positions = "auto"

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """The same cells for every image of a grid."""
        return upload(stratified(images.rows, images.columns, k), images.device).expand(len(images.number), k)
