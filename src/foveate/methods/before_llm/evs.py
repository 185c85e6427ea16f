"""EVS: of a video, the tokens stay that differ most from what was at their place one frame earlier.

The first frame stays whole, and so does a picture, which has no earlier one. Paper: "Efficient Video Sampling: Pruning
Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624. As vLLM's ``--video-pruning-rate`` counts, ``rate``
of all tokens go, rounded up, but never so many that less than a frame's would stay; survivors keep their original positions
under M-RoPE. Reconstructed: frames that are handed over as pictures stay whole, unless ``Session.films`` says that they are
a video; behind a method that dropped tokens, a place that was empty one frame earlier counts as changed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import In
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.roles import Item
from foveate.core.shape import Shape
from foveate.ops.select import top_k

FIRST = 255.0
"""Dissimilarity of what has nothing before it."""


def retained(frames: int, tokens: int, rate: float) -> int:
    """How many stay of ``frames`` frames of ``tokens`` tokens."""
    return max(tokens, int(frames * tokens * (1 - rate)))


def dissimilarity(x: Tensor, ordinal: Tensor, frames: int, tokens: int) -> Tensor:
    """``[I, n]`` one minus the cosine with the token at the same place one frame earlier.

    Args:
        x: ``[I, n, D]`` tokens.
        ordinal: ``[I, n]`` their raster indices, ``tokens`` for each frame.
        frames: of each video.
        tokens: of each frame.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=2)
    place = torch.full((len(x), frames * tokens), -1, device=x.device)
    place = place.scatter(1, ordinal, torch.arange(x.shape[1], device=x.device).expand_as(ordinal))
    earlier = place.gather(1, (ordinal - tokens).clamp(min=0)).masked_fill(ordinal < tokens, -1)
    before = unit.gather(1, earlier.clamp(min=0)[..., None].expand_as(unit))
    return torch.where(earlier < 0, FIRST, 1 - (unit * before).sum(2))


@register
@dataclass(frozen=True)
class EVS(ItemTokens):
    """Keep the projected tokens that changed most since the frame before."""

    name = "evs"
    title = "EVS"
    group = "before_llm"
    paper = "arXiv 2510.14624"
    helps = "Videos in which much stands still: what a frame repeats of the one before goes. Pictures are left alone."
    identity_at = {"rate": 0.0}  # noqa: RUF012

    rate: Annotated[float, In(0, 1)] = 0.7
    """Share of a video's tokens that go, as far as one frame's stay."""
    positions: Positions = "auto"

    def wanted(self, item: Item) -> int:
        """A frame's tokens at least."""
        return retained(item.frames, item.count // item.frames, self.rate)

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, and those of the frame before beside them."""
        return super().workspace(shape) + 4 * shape.floats(shape.hidden)

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """The most dissimilar ones, earlier ones first among equals."""
        tokens = images.rows * images.columns // images.frames
        return top_k(dissimilarity(images.x, images.ordinal, images.frames, tokens), k).sort(dim=1).values
