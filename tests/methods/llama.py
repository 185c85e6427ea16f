"""The functions of a Llama layer that methods may call, from bare weights."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from foveate.core.layout import Layout

QueryKey = Callable[..., tuple[Tensor, Tensor]]


def rotate(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """``x`` ``[B, H, n, d]`` turned by the first row of ``positions`` ``[R, B, n]``, halves into each other."""
    half = x.shape[-1] // 2
    angle = positions[0, :, None, :, None] * base ** -(torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def query_key(norm: Tensor, query: Tensor, key: Tensor, heads: int, eps: float = 1e-5, base: float = 10000.0) -> QueryKey:
    """The function ``query_key`` of a layer with these weights, each ``[out, D]``, and RMS norm ``[D]``."""
    width = query.shape[0] // heads

    def function(x: Tensor, layout: Layout, rope: bool = True) -> tuple[Tensor, Tensor]:
        normed = x.float() * (x.float().square().mean(-1, keepdim=True) + eps).rsqrt() * norm
        made = [(normed @ weight.T).unflatten(-1, (-1, width)).transpose(1, 2) for weight in (query, key)]
        return tuple(rotate(m, layout.positions, base) if rope else m for m in made)  # type: ignore[return-value]

    return function


def random_query_key(width: int, heads: int = 2, kv_heads: int = 1, seed: int = 0) -> QueryKey:
    """A layer with random weights."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(width, width, generator=generator)
    return query_key(torch.ones(width), query, torch.randn(width // heads * kv_heads, width, generator=generator), heads)
