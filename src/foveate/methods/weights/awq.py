"""AWQ: inputs that are large on average get finer steps, by a scale whose strength is searched for each group of linears.

Paper: "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration", arXiv 2306.00978. As published, all
groups are searched on what the unquantized model feeds them, and a linear with an input of its own has a scale only where an
earlier linear can take it over (not where heads share values). The clipping is the authors', but for all linears: they leave
out queries and keys. A baseline of the systems that know what a visual token is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.core.registry import register
from foveate.core.roles import Role
from foveate.core.weights import Bits, Block, GroupSize, Inspected, Replaced, Stream, Weights
from foveate.ops.grid import Grid
from foveate.ops.scaling import Found, block_moments, clipped, search

Heed = Callable[[Inspected], Tensor]
"""What the rows ``[B, T]`` of a part of a block weigh in the search."""


def mean_size(block: Block, name: str, stream: Stream = "exact") -> Tensor:
    """``[in]`` mean magnitude of each of a linear's inputs over all rows."""
    total, count = torch.zeros(()), 0
    for rows in block.exact(name) if stream == "exact" else block.reached(name):
        total, count = total.to(rows.x.device) + rows.x.float().abs().sum(0), count + len(rows.x)
    return total / count


@register
@dataclass(frozen=True)
class AWQ(Weights):
    """Scales by mean activations, their strength searched."""

    name = "awq"
    title = "AWQ"
    group = "weights"
    paper = "arXiv 2306.00978"
    helps = "For weights of 4 or 3 bits in groups, with a few samples; all tokens count alike."
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16}

    bits: Bits = 3
    """Bits of a weight; 16 leaves the model as it is."""
    group_size: GroupSize = 128
    """Neighbouring inputs of a row that share a step (it must divide the inputs of each linear); -1 = the whole row."""
    symmetric: bool = False
    """Whether grids are symmetric; if not, each step has a zero point, too."""
    loss: Literal["mae", "mse"] = "mse"
    """What the search compares outputs by: mean absolute or mean squared errors."""
    clip: bool = True
    """Whether the range of each row or group is then cut to where its part of the output changes least."""

    def heed(self, block: Block, names: Sequence[str]) -> Heed:
        """What rows weigh in the search for the scale of these linears: all alike."""
        count = sum(len(rows.x) for rows in block.exact(names[0]))
        return lambda part: (part.role.to(part.x.device) != Role.PAD) / count

    def found(self, block: Block, names: Sequence[str], weights: Mapping[str, Tensor]) -> Found:
        """The scale of these linears."""
        size, heed = mean_size(block, names[0]), self.heed(block, names)
        return self.searched(block.inspect(names), weights, size, heed)

    def searched(self, parts: Iterable[Inspected], weights: Mapping[str, Tensor], size: Tensor, heed: Heed) -> Found:
        """`foveate.ops.scaling.search` with the method's settings."""
        power = 1.0 if self.loss == "mae" else 2.0
        return search(parts, weights, size, heed, self.rounded, activations=self.activations, power=power)

    def rounded(self, weight: Tensor) -> Tensor:
        """A weight ``[out, in]`` as a search sees it."""
        return Grid.of(weight, self.bits, self.group_size, self.symmetric).rounded(weight)

    def quantize(self, block: Block) -> None:
        """Place every linear, behind the scale of its group if it has one."""
        for names in block.groups:
            weights = {name: block.weight(name) for name in names}
            scale = None
            if len(names) > 1 or block.feeder(names[0]) is not None:
                scale = self.found(block, names, weights).scale.to(block.dtype).float()
            moments = None
            if self.clip:
                rows = (rows.x.float() if scale is None else rows.x.float() / scale for rows in block.exact(names[0]))
                moments = block_moments(rows, self.group_size)
            for name, weight in weights.items():
                weight = weight if scale is None else weight * scale
                if moments is None:
                    grid = Grid.of(weight, self.bits, self.group_size, self.symmetric, stored=block.dtype)
                else:
                    grid = clipped(weight, moments, self.bits, self.group_size, self.symmetric, stored=block.dtype)
                block.place(name, Replaced(grid, grid.integers(weight), scale, self.activations))
