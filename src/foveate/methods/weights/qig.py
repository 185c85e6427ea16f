"""QIG: AWQ's search, in which each token weighs as much as the error of quantization is attributed to it.

Paper: "Fine-Grained Post-Training Quantization for Large Vision Language Models with Quantization-Aware Integrated
Gradients", arXiv 2603.17809. Attributions are integrated gradients of how far the part of the block moves when all its
linears are rounded: from nothing to the input if weights alone are rounded; else from what quantized blocks before have made
of it. The published code, with rounded activations, does not clip attributions and lets gradients pass through the exact
branch alone (`released`). Its counter, which leaves five groups with equal weights (a slip, say its authors), is not
followed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.parameters import AtLeast
from foveate.core.registry import register
from foveate.core.roles import Role
from foveate.core.weights import Block, Inspected, Stand, Stream
from foveate.methods.weights.awq import AWQ, mean_size
from foveate.ops.grid import tokens
from foveate.ops.scaling import Found

Function = Callable[[Tensor], Tensor]


def attributed(exact: Function, rounded: Function, x: Tensor, base: Tensor, there: Tensor, points: int = 32) -> Tensor:
    """``[B, T]`` integrated gradients of ``|exact - rounded|``, sizes averaged over channels, with sum 1 for each sample.

    Args:
        exact, rounded: from ``[B, T, D]`` to ``[B, T, D']``; a function without gradients counts as a constant.
        x: ``[B, T, D]`` where the path ends.
        base: the same, where it starts.
        there: ``[B, T]`` bool: rows that are no padding; others have 0.
        points: of the path, both ends among them.
    """
    way, total = (x - base).detach(), torch.zeros_like(x)
    for share in torch.linspace(0, 1, points).tolist():
        with torch.enable_grad():
            at = (base + share * way).detach().requires_grad_()
            apart = (exact(at) - rounded(at)).abs().mean(-1)
            total += torch.autograd.grad((apart * there).sum(), at)[0]
    return normalised((way * total).abs().mean(-1), there)


def normalised(weights: Tensor, there: Tensor) -> Tensor:
    """``weights`` ``[B, T]`` with sum 1 over the rows that are ``there``; equal where all are 0."""
    weights = weights * there
    weights = torch.where(weights.sum(1, keepdim=True) > 0, weights, there.to(weights.dtype))
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def clipped(weights: Tensor, there: Tensor, reach: float = 1.5) -> Tensor:
    """``weights`` ``[B, T]``, those beyond ``reach`` times the distance between quartiles brought back, with sum 1 again."""
    known = weights.float().masked_fill(~there, float("nan"))
    low, high = known.nanquantile(known.new_tensor([0.25, 0.75]), dim=1, keepdim=True)
    margin = reach * (high - low)
    return normalised(torch.minimum(torch.maximum(weights, low - margin), high + margin), there)


@register
@dataclass(frozen=True)
class QIG(AWQ):
    """AWQ with tokens weighed by attributions."""

    name = "qig"
    title = "QIG"
    paper = "arXiv 2603.17809"
    helps = (
        "Instead of AWQ or MBQ, with time for some forty more passes of each block: single tokens that matter count more."
    )
    streams: ClassVar[tuple[Stream, ...]] = ("exact", "reached")

    loss: Literal["mae", "mse"] = "mae"
    """What the search compares outputs by: mean absolute or mean squared errors."""
    clip: bool = False
    """Whether the range of each row or group is then cut to where its part of the output changes least (as in AWQ)."""
    points: Annotated[int, AtLeast(2)] = 32
    """Points of each path of integration."""
    reach: Annotated[float, AtLeast(0)] = 1.5
    """Distances between quartiles, beyond which attributions are brought back."""
    released: bool = False
    """Whether, with rounded activations, attributions are those of the published code rather than the paper's."""

    def found(self, block: Block, names: Sequence[str], weights: Mapping[str, Tensor]) -> Found:
        """The scale of these linears."""
        stream: Stream = "reached" if self.activations < 16 else "exact"
        both = zip(block.inspect(names, "exact"), block.inspect(names, stream), strict=True)
        each = [self.weigh(block, exact, part) for exact, part in both]
        total, turn = sum(float(weights.sum()) for weights in each), iter(each)
        return self.searched(
            block.inspect(names, stream), weights, mean_size(block, names[0], stream), lambda part: next(turn) / total
        )

    def weigh(self, block: Block, exact: Inspected, part: Inspected) -> Tensor:
        """What the rows ``[B, T]`` of a part of a block weigh, given also what the unquantized model feeds it."""
        x, there = exact.x, exact.role.to(exact.x.device) != Role.PAD
        stands = {name: self.stand(block.weight(name)) for name in part.linears}
        base = part.x if self.activations < 16 else torch.zeros_like(x)
        found = attributed(part.run, lambda given: part.run(given, stands), x, base, there, self.points)
        return found if self.released and self.activations < 16 else clipped(found, there, self.reach)

    def stand(self, weight: Tensor) -> Stand:
        """The product with a weight as it is rounded without a scale; gradients pass rounding straight through."""
        rounded = self.rounded(weight)

        def product(x: Tensor) -> Tensor:
            if self.activations < 16:
                x = x.detach() if self.released else x
                x = x + (tokens(x.detach(), self.activations) - x.detach())
            return functional.linear(x, rounded.to(x.dtype))

        return product
