"""Positions without the gaps between them."""

from __future__ import annotations

import torch
from torch import Tensor


def dense_ranks(x: Tensor) -> Tensor:
    """How many different smaller numbers each of ``x`` ``[..., n]`` (integers) has beside it: ``[..., n]``."""
    ordered, order = x.sort(dim=-1, stable=True)
    steps = torch.nn.functional.pad((ordered[..., 1:] != ordered[..., :-1]).long().cumsum(-1), (1, 0))
    return torch.zeros_like(x).scatter(-1, order, steps)


def closed_up(positions: Tensor, prefix: int) -> Tensor:
    """Positions ``[R, n]`` without gaps behind the prefix, on each axis by itself."""
    start = positions[:, :prefix].amax(1, keepdim=True) + 1 if prefix else 0
    return torch.cat([positions[:, :prefix], dense_ranks(positions[:, prefix:]) + start], dim=1)
