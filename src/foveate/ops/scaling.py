"""Scales that move the difficulty of rounding from one side of a product to the other: ``(x / s) (W s)^T = x W^T``.

A weight is ``[out, in]``, a scale ``[in]``; linears with the same input share one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

from foveate.ops.grid import Grid, cut, spans, tokens

RATIOS = tuple(step / 20 for step in range(20))
"""The exponents that AWQ's search tries; 0 is plain rounding."""
SHRINKS = tuple(1 - step / 20 for step in range(10))
"""The shares of a group's range that AWQ's clipping tries."""

Rounding = Callable[[Tensor], Tensor]
"""A weight ``[out, in]`` moved to its grid."""
Product = Callable[[Tensor], Tensor]
"""Inputs ``[..., in]`` to outputs ``[..., out]``."""


class Part(Protocol):
    """Something that holds linears (`foveate.core.weights.Inspected`), on the inputs ``x`` ``[B, T, D]`` of one batch."""

    @property
    def x(self) -> Tensor:
        """What enters it."""

    def run(self, x: Tensor, stands: Mapping[str, Product] | None = None) -> Tensor:
        """What it makes of ``x``, with other products for the linears named."""


P = TypeVar("P", bound=Part)


def smoothing(inputs: Tensor, weights: Sequence[Tensor], alpha: float = 0.5) -> Tensor:
    """SmoothQuant's scale ``[in]``: ``max |x| ** alpha / max |w| ** (1 - alpha)``, at least 1e-5.

    Args:
        inputs: ``[in]`` largest magnitude of each input.
        weights: of the linears that share it, ``[out, in]`` each.
        alpha: share of the difficulty that goes to the weights.
    """
    most = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0).clamp(min=1e-5)
    return (inputs**alpha / most ** (1 - alpha)).clamp(min=1e-5)


def equalising(size: Tensor, ratio: float) -> Tensor:
    """AWQ's scale ``[in]``: the mean magnitudes ``size`` ``[in]`` to a power, with 1 midway between its ends."""
    scale = (size**ratio).clamp(min=1e-4)
    return scale / (scale.amax() * scale.amin()).sqrt()


def scaled(weight: Tensor, scale: Tensor, rounding: Rounding, activations: int = 16) -> Product:
    """The product with ``weight`` ``[out, in]``, rounded behind its scale; the input is rounded to ``activations`` bits."""
    rounded = rounding(weight * scale)
    return lambda x: functional.linear(tokens(x / scale.to(x.dtype), activations), rounded.to(x.dtype))


@dataclass(frozen=True, eq=False)
class Found:
    """What a search for a scale came to.

    Attributes:
        losses: ``[len(ratios)]`` float64, in the order of the ratios.
        ratio: the best exponent, the least of equals.
        scale: ``[in]``.
    """

    losses: Tensor
    ratio: float
    scale: Tensor


def search(
    parts: Iterable[P],
    weights: Mapping[str, Tensor],
    size: Tensor,
    heed: Callable[[P], Tensor],
    rounding: Rounding,
    *,
    activations: int = 16,
    power: float = 2.0,
    ratios: Sequence[float] = RATIOS,
) -> Found:
    """The exponent whose scale changes least what ``parts`` make.

    Args:
        parts: one for each batch.
        weights: ``[out, in]`` of the linears that share the scale, by name.
        size: ``[in]`` mean magnitude of each input.
        heed: what the rows of a part weigh, ``[B, T]``.
        rounding: what moves a weight to its grid.
        activations: bits of inputs; 16 = as they are.
        power: of an error; the mean over a row's outputs is what is weighed.
        ratios: exponents to try.
    """
    losses = torch.zeros(len(ratios), dtype=torch.float64, device=size.device)
    scales = [equalising(size, ratio) for ratio in ratios]
    for part in parts:
        with torch.no_grad():
            wanted, weight = part.run(part.x).float(), heed(part)
            for place, scale in enumerate(scales):
                stands = {name: scaled(own, scale, rounding, activations) for name, own in weights.items()}
                error = (part.run(part.x, stands).float() - wanted).abs_().pow_(power).mean(-1)
                losses[place] += (error * weight).sum(dtype=torch.float64)
    best = int(losses.argmin())
    return Found(losses, ratios[best], scales[best])


def clipped(
    weight: Tensor,
    moments: Tensor,
    bits: int,
    group: int = -1,
    symmetric: bool = True,
    *,
    shrinks: Sequence[float] = SHRINKS,
    stored: torch.dtype | None = None,
) -> Grid:
    """AWQ's clipping: of each row and group the share of its largest magnitude that changes its part of the output least.

    Args:
        weight: ``[out, in]``, behind its scale.
        moments: ``[groups, width, width]`` of each group's inputs, `block_moments`.
        shrinks: shares to try.
        stored: see `Grid.between`.
    """
    low, high = spans(weight, group)
    most = torch.maximum(low.abs(), high.abs())
    best = torch.full_like(low, float("inf"))
    limit = most
    parts = moments.shape[0]

    def make(limit: Tensor) -> Grid:
        ends = torch.maximum(low, -limit), torch.minimum(high, limit)
        return Grid.between(*ends, bits, symmetric, stored=stored)

    for shrink in shrinks:
        error = cut(make(most * shrink).rounded(weight) - weight, parts).to(moments.dtype)
        loss = (torch.einsum("ogi,gij->ogj", error, moments) * error).sum(-1).to(best.dtype)
        better = loss < best
        best, limit = torch.where(better, loss, best), torch.where(better, most * shrink, limit)
    return make(limit)


def block_moments(rows: Iterable[Tensor], group: int = -1) -> Tensor:
    """``[groups, width, width]`` sums of ``x x^T`` over ``rows`` ``[n, in]`` of all batches, within each group of inputs."""
    total: Tensor | None = None
    for x in rows:
        parts = cut(x.float(), 1 if group == -1 else x.shape[-1] // group)
        found = torch.einsum("tgi,tgj->gij", parts, parts)
        total = found if total is None else total.add_(found)
    assert total is not None, "no rows"
    return total
