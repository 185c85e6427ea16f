"""Parts of an attention map, computed without ever forming the whole of it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 64
"""Queries whose attention is held at a time, over all keys and heads."""
Allowed = Callable[[int, int], Tensor]
"""Which keys the queries from ``start`` to ``stop`` may see: ``(start, stop)`` to ``[B or 1, stop - start, K]`` bool."""


def row_logits(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """Scaled logits of some queries, float32.

    Args:
        query: ``[B, H, Q, d]``, the chosen rows only.
        key: ``[B, Hkv, K, d]``; query head h reads key head ``h // (H / Hkv)``.
        scale: factor of the logits.

    Returns:
        ``[B, H, Q, K]``.
    """
    batch, heads, rows, width = query.shape
    kv_heads = key.shape[1]
    grouped = query.float().reshape(batch, kv_heads, heads // kv_heads * rows, width)
    return (grouped * scale @ key.float().transpose(-1, -2)).reshape(batch, heads, rows, key.shape[2])


def causal(valid: Tensor) -> Allowed:
    """Rows of one sequence see valid rows up to themselves; ``valid`` ``[B, N]`` bool."""
    index = torch.arange(valid.shape[1], device=valid.device)
    return lambda start, stop: (index <= index[start:stop, None]) & valid[:, None]


def received(
    query: Tensor,
    key: Tensor,
    weight: Tensor,
    scale: float,
    allowed: Allowed | None = None,
    chunk: int = CHUNK,
    elsewhere: Tensor | None = None,
    by_head: bool = False,
) -> Tensor:
    """Attention received by each key from groups of queries: weighted sums over queries of the mean over heads, float32.

    Works through ``chunk`` queries at a time, so memory is ``B * H * chunk * K`` floats.

    Args:
        query: ``[B, H, Q, d]``.
        key: ``[B, Hkv, K, d]``.
        weight: ``[B or 1, G, Q]`` weight of each query in each of G sums.
        scale: factor of the logits.
        allowed: which query may see which key; None = all.
        chunk: queries at a time.
        elsewhere: ``[B, H, Q]`` log-sum-exp of each query's logits over keys besides these, that share its attention.
        by_head: for each key-value head the mean over its query heads, instead of that over all.

    Returns:
        ``[B, G, K]``, or ``[B, Hkv, G, K]`` by head.
    """
    rows, keys, heads = query.shape[2], key.shape[2], query.shape[1]
    mean_over = heads // key.shape[1] if by_head else heads
    total = query.new_zeros(query.shape[0], heads, weight.shape[1], keys, dtype=torch.float32)
    key = key.float()
    for start in range(0, rows, chunk):
        stop = min(start + chunk, rows)
        logits = row_logits(query[:, :, start:stop], key, scale)
        counted = weight[:, None, :, start:stop].float() / mean_over  # [B or 1, 1, G, queries]
        if allowed is not None:
            visible = allowed(start, stop)
            logits = logits.masked_fill_(~visible[:, None], torch.finfo(logits.dtype).min)
            # The finite number makes a padding query, which sees nothing, see everything alike.
            counted = counted * visible.any(-1)[:, None, None]
        if elsewhere is not None:
            share = (logits.logsumexp(-1) - elsewhere[:, :, start:stop]).sigmoid()
            counted = counted * share[:, :, None]
        total = total + counted @ logits.softmax(-1)
    return total.reshape(len(total), -1, mean_over, *total.shape[2:]).sum(2) if by_head else total.sum(1)


def columns(
    query: Tensor,
    key: Tensor,
    scale: float,
    allowed: Tensor | None = None,
    chunk: int = CHUNK,
    elsewhere: Tensor | None = None,
    by_head: bool = False,
) -> Tensor:
    """Attention received by each key: the mean over heads and over the queries that may see it, float32.

    Args:
        query: ``[B, H, Q, d]``.
        key: ``[B, Hkv, K, d]``.
        scale: factor of the logits.
        allowed: ``[B or 1, Q, K]`` bool, which query may see which key; None = all. Who may see none, padding, is no query.
        chunk: queries at a time.
        elsewhere: as `received` takes it.
        by_head: for each key-value head the mean over its query heads, instead of that over all.

    Returns:
        ``[B, K]``, or ``[B, Hkv, K]`` by head.
    """
    every = torch.ones(1, 1, query.shape[2], device=query.device)
    mask = None if allowed is None else lambda start, stop: allowed[:, start:stop]
    seen_by = query.shape[2] if allowed is None else allowed.sum(1).clamp(min=1)
    sums = received(query, key, every, scale, mask, chunk, elsewhere, by_head).squeeze(-2)
    return sums / (seen_by[:, None] if by_head and isinstance(seen_by, Tensor) else seen_by)


def from_rows(query: Tensor, key: Tensor, rows: Tensor, allowed: Tensor, chunk: int = CHUNK) -> Tensor:
    """Attention that each key gets from some queries: the mean over heads and over those queries, float32.

    Args:
        query: ``[B, H, N, d]``.
        key: ``[B, Hkv, K, d]``.
        rows: ``[B, Q]`` the queries, -1 = padding.
        allowed: ``[B, Q or 1, K]`` bool, which of them sees which key.
        chunk: queries at a time.

    Returns:
        ``[B, K]``; 0 where no query sees the key.
    """
    heads, width = query.shape[1], query.shape[3]
    chosen = query.gather(2, rows.clamp(min=0)[:, None, :, None].expand(-1, heads, -1, width))
    return columns(chosen, key, width**-0.5, allowed & (rows >= 0)[..., None], chunk)
