"""A number of things, dealt out to several who have a claim to them."""

from __future__ import annotations

import torch
from torch import Tensor

FAINTEST = 1e-9
"""A weight of 0, beside a largest one of 1: whoever has none gets his share of what nobody else can take."""
ALIKE = 1e-6
"""Remainders that differ by less are equal."""


def dealt(weights: Tensor, total: Tensor, most: Tensor, least: Tensor | None = None) -> Tensor:
    """Whole numbers in proportion to ``weights``, within bounds, that add up to ``total``.

    What goes beyond a bound is dealt out to the others in the same proportion. So that the sum is exact, the largest
    fractions are rounded up, of equal ones those of the lowest indices. Weights that are all 0 are equal ones.

    Args:
        weights: ``[..., P]``, 0 or more.
        total: ``[...]`` whole; where the bounds ask for more, or have room for less, that is dealt out.
        most: ``[..., P]`` whole upper bounds.
        least: ``[..., P]`` whole lower bounds, no larger than ``most``; None = 0.

    Returns:
        ``[..., P]`` int64.
    """
    high = most.double()
    low = torch.zeros_like(high) if least is None else least.double()
    total = torch.maximum(torch.minimum(total.double(), high.sum(-1)), low.sum(-1))[..., None]
    largest = weights.amax(-1, keepdim=True).double()
    weight = torch.where(largest > 0, weights.double() / largest, 1.0).clamp(min=FAINTEST)
    # What all get together grows with the common factor, linearly between the factors where somebody meets a bound.
    factors = torch.cat([low / weight, high / weight], dim=-1).sort(dim=-1).values
    sums = (factors[..., None] * weight[..., None, :]).clamp(low[..., None, :], high[..., None, :]).sum(-1)
    below = ((sums <= total).sum(-1, keepdim=True) - 1).clamp(min=0)
    above = (below + 1).clamp(max=factors.shape[-1] - 1)
    (start, end), (first, last) = ([x.gather(-1, below), x.gather(-1, above)] for x in (factors, sums))
    part = ((total - first) / (last - first).where(last > first, 1.0)).clamp(0, 1)
    share = ((start + part * (end - start)) * weight).clamp(low, high)
    whole = share.floor()
    remainder = ((share - whole) / ALIKE).round()
    order = remainder.argsort(dim=-1, descending=True, stable=True)
    one_more = torch.arange(order.shape[-1], device=order.device) < total - whole.sum(-1, keepdim=True)
    return whole.long().scatter_add(-1, order, one_more.expand_as(order).long())
