"""Parts of an attention map, computed without ever forming the whole of it."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return (grouped @ key.float().transpose(-1, -2) * scale).reshape(batch, heads, rows, -1)


def columns(query: Tensor, key: Tensor, scale: float, allowed: Tensor | None = None, chunk: int = 64) -> Tensor:
    """Attention received by each key: the mean over heads and over the queries that may see it, float32.

    Works through ``chunk`` queries at a time, so memory is ``B * H * chunk * K`` floats.

    Args:
        query: ``[B, H, Q, d]``.
        key: ``[B, Hkv, K, d]``.
        scale: factor of the logits.
        allowed: ``[B or 1, Q, K]`` bool, which query may see which key; None = all.
        chunk: queries at a time.

    Returns:
        ``[B, K]``.
    """
    received = query.new_zeros(query.shape[0], key.shape[2], dtype=torch.float32)
    for start in range(0, query.shape[2], chunk):
        logits = row_logits(query[:, :, start : start + chunk], key, scale)
        if allowed is not None:
            visible = allowed[:, None, start : start + chunk]
            # A padding query sees nothing: its softmax is 0 / 0 and counts for nothing.
            logits = logits.masked_fill(~visible, float("-inf"))
            received += logits.softmax(-1).nan_to_num(0.0).sum((1, 2))
        else:
            received += logits.softmax(-1).sum((1, 2))
    seen_by = query.shape[2] if allowed is None else allowed.sum(1).clamp(min=1)
    return received / (query.shape[1] * seen_by)


def from_rows(query: Tensor, key: Tensor, rows: Tensor, allowed: Tensor, chunk: int = 64) -> Tensor:
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
