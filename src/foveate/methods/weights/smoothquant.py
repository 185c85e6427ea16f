"""SmoothQuant: large activations are made smaller, and the weights that meet them larger, before both are rounded.

Paper: "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models", arXiv 2211.10438. As in
the published code, linears that share one input (those behind a norm) share a scale; others are rounded as they are. A
baseline of the systems that know what a visual token is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch

from foveate.core.parameters import In
from foveate.core.registry import register
from foveate.core.weights import Bits, Block, Replaced, Weights
from foveate.ops.grid import Grid
from foveate.ops.scaling import smoothing


@register
@dataclass(frozen=True)
class SmoothQuant(Weights):
    """Scales by the largest activations and weights."""

    name = "smoothquant"
    title = "SmoothQuant"
    group = "weights"
    paper = "arXiv 2211.10438"
    helps = (
        "For weights and activations of 8 bits together, on models with a few inputs that are far larger than all others."
    )
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16, "activations": 16}

    bits: Bits = 8
    """Bits of a weight; 16 leaves the model as it is."""
    activations: Bits = 8
    """Bits that each row of a linear's input is rounded to on the way; 16 = none."""
    alpha: Annotated[float, In(0, 1)] = 0.5
    """Share of the difficulty that goes from activations to weights; 0.5 in the paper for most models."""

    def quantize(self, block: Block) -> None:
        """Place every linear, behind the scale of its group where it is one of several."""
        for names in block.groups:
            weights = {name: block.weight(name) for name in names}
            scale = None
            if len(names) > 1:
                most = torch.stack([rows.x.abs().amax(0) for rows in block.exact(names[0])]).amax(0).float()
                scale = smoothing(most, list(weights.values()), self.alpha).to(block.dtype).float()
            for name, weight in weights.items():
                weight = weight if scale is None else weight * scale
                grid = Grid.of(weight, self.bits, self.group_size, self.symmetric, stored=block.dtype)
                block.place(name, Replaced(grid, grid.integers(weight), scale, self.activations))
