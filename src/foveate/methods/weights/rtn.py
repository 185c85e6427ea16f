"""Round to nearest: each weight becomes the nearest point of its row's grid, whatever the model is fed.

The baseline of all other methods here. Grids go from the least to the largest weight of a row (or group of inputs), or, with
`clip`, to the share of that range that makes the squared error of the weights least, out of those that GPTAQ's code tries;
below 4 bits without groups everything else is no fair comparison.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.core.registry import register
from foveate.core.weights import Block, Replaced, Stream, Weights
from foveate.ops.grid import Grid


@register
@dataclass(frozen=True)
class RTN(Weights):
    """Rounding to nearest; needs no samples."""

    name = "rtn"
    title = "Round to nearest"
    group = "weights"
    paper = "baseline"
    helps = (
        "For weights of 8 bits, or of 4 in groups, where it loses next to nothing and takes seconds; below, as what "
        "others are compared with."
    )
    streams: ClassVar[tuple[Stream, ...]] = ()
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16}

    clip: bool = False
    """Whether the range of each row or group is cut to where the squared error of its weights is least."""

    def quantize(self, block: Block) -> None:
        """Place every linear, one like the other."""
        make = Grid.searched if self.clip else Grid.of
        for name in (name for names in block.groups for name in names):
            weight = block.weight(name)
            grid = make(weight, self.bits, self.group_size, self.symmetric, stored=block.dtype)
            block.place(name, Replaced(grid, grid.integers(weight), activations=self.activations))
