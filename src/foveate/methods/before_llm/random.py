"""Random visual tokens: the baseline that every method has to beat.

Reconstructed: papers that compare with random selection do not say how they draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.ops.draw import draw


@register
@dataclass(frozen=True)
class Random(ItemTokens):
    """Keep a random subset of each image's tokens, the same on every run with the same seed."""

    name = "random"
    title = "Random selection"
    group = "before_llm"
    paper = "baseline"
    helps = "As a baseline: what another method keeps of the score beyond this one is what its choice is worth."

    keep: int | float = 0.25
    positions: Positions = "auto"

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """One draw for each place in the prompt."""
        drawn = [draw(images.count, k, images.seed, number) for number in images.number]
        return upload(torch.stack(drawn), images.device)
