"""Attention masks for sequences with gaps.

The model builds its own mask as if nothing had been removed; its rows and columns are then picked here. So padding, sliding
windows, bidirectional images and whatever else a family knows keep their meaning in terms of the original tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.errors import FoveateError


def pick(
    base: Tensor | None,
    queries: Tensor,
    keys: Tensor,
    past: int,
    kernel: str,
    x: Tensor,
    in_order: bool = False,
) -> Tensor:
    """The mask of rows ``queries`` over entries ``keys``.

    Args:
        base: the model's own mask over all tokens: ``[B or 1, 1, q, L]`` (bool, or additive float), ``[B, L]`` (padding
            only, FlashAttention), or None for plain causal attention.
        queries: ``[B, n]`` token numbers, -1 = padding.
        keys: ``[B, 1 or Hkv, m]`` token numbers, -1 = padding.
        past: tokens seen before this forward; row 0 of ``base`` is token ``past``.
        kernel: attention implementation, which decides the form of a mask made from None.
        x: any tensor of the layer's dtype and device.
        in_order: whether several rows may have one number. The last n keys are then the rows themselves, and of those with
            one number a row does not see the later ones.

    Returns:
        ``[B, 1 or Hkv, n, m]``, or ``[B, m]`` for FlashAttention.
    """
    if "flash" in kernel:
        return _key_mask(base, keys)
    there, real = keys >= 0, queries >= 0
    if base is None:
        allowed = keys[:, :, None] <= queries[:, None, :, None]
    else:
        sample = torch.arange(base.shape[0], device=x.device).reshape(-1, 1, 1, 1)
        rows = (queries - past).clamp(min=0)[:, None, :, None]
        allowed = base[sample, 0, rows, keys.clamp(min=0)[:, :, None]]
    if in_order:
        n, m = queries.shape[1], keys.shape[2]
        row = torch.arange(m, device=keys.device) - (m - n)
        later = (keys[:, :, None] == queries[:, None, :, None]) & (row > row[m - n :, None])
        plain = base is None or base.dtype == torch.bool
        allowed = allowed & ~later if plain else allowed.masked_fill(later, torch.finfo(allowed.dtype).min)
    if base is None or base.dtype == torch.bool:
        # A padding row may look anywhere: what it computes is never read, but a row that sees nothing gives NaN.
        allowed = (allowed & there[:, :, None]) | ~real[:, None, :, None]
        return additive(allowed, x) if kernel == "eager" else allowed
    closed = torch.finfo(allowed.dtype).min
    return allowed.masked_fill(~there[:, :, None], closed).masked_fill(~real[:, None, :, None], 0)


def by_head(mask: Tensor, heads: int) -> Tensor:
    """A mask by key-value head, repeated for the query heads that share it."""
    if mask.ndim == 2 or mask.shape[1] in (1, heads):
        return mask
    return mask.repeat_interleave(heads // mask.shape[1], dim=1)


def _key_mask(base: Tensor | None, keys: Tensor) -> Tensor:
    if keys.shape[1] > 1:
        raise FoveateError("batch: FlashAttention takes no mask by head; run ragged batches with attn_implementation='sdpa'")
    there = keys[:, 0] >= 0
    if base is not None:
        there = there & base.bool().expand(keys.shape[0], -1).gather(1, keys[:, 0].clamp(min=0))
    return there


def additive(allowed: Tensor, x: Tensor) -> Tensor:
    """A mask of what is allowed, as numbers to add to the logits of ``x``'s layer."""
    return torch.zeros_like(allowed, dtype=x.dtype).masked_fill(~allowed, torch.finfo(x.dtype).min)
