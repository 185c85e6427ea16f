"""Attention for training on a CPU, where matrix products beat the fused kernels backwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

PACKED = "foveate_packed"
"""Name under which models find `attend_packed`."""
_BLOCKS = 4


def attend_packed(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of rows ``[B, H, N, D]``, returned as ``[B, N, H, D]`` as transformers expects it.

    Without a mask everything sees everything. A mask ``[B, 1, T, N]``, additive, is that of the last ``T`` rows alone; the
    ``N - T`` before them, a picture and what stands before it, are causal. ``query``, ``key`` and ``value`` may differ in
    type under autocast, and have as many heads.
    """
    query = query * scaling
    key, value = key.to(query.dtype), value.to(query.dtype)
    if attention_mask is None:
        return attend(query, key, value).transpose(1, 2), None
    prefix = key.shape[2] - attention_mask.shape[2]
    future = torch.full((prefix, prefix), -1e4, dtype=query.dtype, device=query.device).triu(1)
    starts = range(0, prefix, -(-prefix // _BLOCKS))
    # In blocks, most of what lies in the future is never computed.
    ends = [*starts[1:], prefix]
    parts = [
        attend(query[:, :, start:end], key[:, :, :end], value[:, :, :end], future[start:end, :end])
        for start, end in zip(starts, ends, strict=True)
    ]
    parts.append(attend(query[:, :, prefix:], key, value, attention_mask.to(query.dtype)))
    return torch.cat(parts, 2).transpose(1, 2), None


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of scaled queries under an additive mask, in the type of the queries: autocast would want float32."""
    with torch.autocast(query.device.type, enabled=False):
        weights = query @ key.transpose(-1, -2)
        return (weights if mask is None else weights + mask).softmax(-1) @ value


AttentionInterface.register(PACKED, attend_packed)
