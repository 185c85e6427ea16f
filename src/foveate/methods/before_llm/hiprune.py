"""HiPrune: keep what a middle encoder layer looks at, its neighbours, and what the output layer looks at.

Paper: "HiPrune: Hierarchical Attention for Efficient Token Pruning in Vision-Language Models", arXiv 2508.00553.
Differs from the released code by default where it disagrees with the paper or fails: neighbours outside the grid are
left out (``border="clamp"`` folds them to the first or last token, as released); tokens already kept are excluded by
masking, not by subtracting 1 from their score; an anchor set larger than the budget is truncated by its middle-layer score
instead of raising. Reconstructed: the object layer of encoders other than CLIP-L (9 of 24) is the same share of the depth.
The text-aware HiPrune++ is not implemented.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import AtLeast, In
from foveate.core.positions import Positions
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Columns, Signal, Site
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.select import top_k

Border = Literal["intersect", "clamp"]


def anchors_and_buffers(middle: Tensor, columns: int, anchors: int, border: Border = "intersect") -> Tensor:
    """Mask ``[I, N]`` of the ``anchors`` best tokens by ``middle`` ``[I, N]`` and their four raster neighbours.

    Left and right neighbours wrap to the adjacent row, as in the paper and in the released code.
    """
    last = middle.shape[1] - 1
    best = top_k(middle, anchors)
    offsets = upload([0, -1, 1, -columns, columns], middle.device)
    cells = (best[:, :, None] + offsets).flatten(1)
    inside = cells.clamp(0, last)
    if border == "intersect":  # a neighbour outside the grid stands for its own anchor
        inside = torch.where(inside == cells, cells, best.repeat_interleave(len(offsets), dim=1))
    return torch.zeros_like(middle, dtype=torch.bool).scatter(1, inside, True)


def hierarchical(
    middle: Tensor, output: Tensor, columns: int, k: int, alpha: float = 0.1, border: Border = "intersect"
) -> Tensor:
    """The tokens to keep: anchors, buffers, and registers to fill the budget.

    Args:
        middle: ``[I, N]`` attention received in the object layer.
        output: ``[I, N]`` attention received in the layer that feeds the projector.
        columns: width of the grid.
        k: budget.
        alpha: share of the budget that anchors with their four buffers may take.
        border: what becomes of neighbours outside the grid.

    Returns:
        ``[I, k]`` raster indices, ascending.
    """
    first = anchors_and_buffers(middle, columns, round(alpha * k / 5), border)
    # Within the first set the middle layer ranks, outside it the output layer; the first set goes before all others.
    rank = torch.where(first, middle, ranked(output)).sort(dim=1, descending=True, stable=True).indices
    tier = first.gather(1, rank).to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
    return rank.gather(1, tier)[:, :k].sort(dim=1).values


@register
@dataclass(frozen=True)
class HiPrune(ItemTokens):
    """Anchors of a middle encoder layer, their buffers, and registers of the output layer."""

    name = "hiprune"
    title = "HiPrune"
    group = "before_llm"
    paper = "arXiv 2508.00553"
    helps = "One choice for any question: no question is read, so a picture may be encoded and pruned before anybody asks."
    needs = ("encoder attention columns (2 layers)", "whole grids")
    needs_grid = True

    keep: int | float = 64
    alpha: Annotated[float, In(0, 1)] = 0.1
    """Share of the budget that goes to anchors and their four neighbours each; registers fill the rest."""
    object_layer: Annotated[int, AtLeast(1)] | None = None
    """Middle layer of the encoder that ranks anchors, counted from 1 as in the paper; None = 3/8 of the depth (9 of 24)."""
    border: Border = "intersect"
    """What neighbours outside the grid stand for: their own anchor (``"intersect"``), or the first or last token
    (``"clamp"``, as released).
    """
    positions: Positions = "auto"

    def check(self, traits: Traits) -> str | None:
        """Needs the encoder's attention, and an object layer that exists."""
        if traits.encoder_layers is None:
            return f"needs encoder attention, which is not available on {traits.family}; use fastv, uniform or random"
        if self.object_layer is not None and not 1 <= self.object_layer <= traits.encoder_layers:
            return f"object_layer={self.object_layer}: must be in 1..{traits.encoder_layers}"
        return super().check(traits)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention received in the object layer and in the output layer."""
        layer = self.object_layer or max(1, round(9 / 24 * (traits.encoder_layers or 0)))
        return Columns(Site("encoder", layer - 1)), Columns(Site("encoder", traits.feature_layer or 0))

    def workspace(self, shape: Shape) -> int:
        """Attention of a chunk of the encoder's queries."""
        return super().workspace(shape) + shape.image_attention(CHUNK)

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Rank by both layers."""
        received = tuple(images.seen.values())  # one map where the object layer is the output layer
        return hierarchical(received[0], received[-1], images.columns, k, self.alpha, self.border)
