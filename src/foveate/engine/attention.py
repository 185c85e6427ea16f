"""Reads attention beside the fused kernel: only the rows or column sums that were asked for."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from foveate.core.signal import Attention
from foveate.models.taps import BEYOND
from foveate.ops.attention import columns, row_logits


def beyond_logits(module: nn.Module) -> str | None:
    """What goes into the softmax of an attention module besides logits and mask; None if nothing does."""
    if getattr(module, "sinks", None) is not None:
        return BEYOND["s_aux"]
    return BEYOND["softcap"] if getattr(module.config, "attn_logit_softcapping", None) else None


def chosen_rows(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, rows: Tensor, elsewhere: Tensor | None = None
) -> Attention:
    """Attention of the query rows ``rows`` ``[B, Q]`` (-1 = padding), over all ``K`` keys.

    ``elsewhere`` ``[B, H, q]`` is the log-sum-exp of each query over further keys.
    """
    there = (rows >= 0)[:, None, :, None]
    index = rows.clamp(min=0)
    chosen = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    allowed = visible(mask, index, query.shape[2], key.shape[2]) & there
    logits = row_logits(chosen, key, scale).masked_fill(~allowed, float("-inf"))
    lse = logits.logsumexp(-1)
    if elsewhere is not None:
        lse = torch.logaddexp(lse, elsewhere.gather(2, index[:, None].expand_as(lse)))
    return Attention(logits, lse.masked_fill(~there[..., 0], 0.0))


def column_means(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    causal: bool = True,
    elsewhere: Tensor | None = None,
    asking: Tensor | None = None,
) -> Tensor:
    """Attention received by each key under the layer's mask: ``[B, K]``.

    ``elsewhere`` as in `chosen_rows`; ``asking`` ``[B, q]`` (bool) are the queries that count, None = all. The mask does not
    tell: padding on the right sees its whole sample.
    """
    if mask is None and not causal and asking is None:
        return columns(query, key, scale)
    rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    if mask is None and not causal:
        allowed = torch.ones(1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    else:
        allowed = visible(mask, rows, query.shape[2], key.shape[2])[:, 0]
    if asking is not None:
        allowed = allowed & asking[..., None]
    return columns(query, key, scale, allowed, elsewhere=elsewhere)


def opened(mask: Tensor) -> Tensor:
    """A mask, additive perhaps, as a bool one of what is allowed."""
    return mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2


def visible(mask: Tensor | None, rows: Tensor, queries: int, keys: int) -> Tensor:
    """``[B, 1 or H, r, K]`` bool: which keys the query rows ``rows`` ``[B, r]`` may see."""
    if mask is not None and mask.ndim == 4:
        picked = mask.expand(rows.shape[0], -1, -1, -1)
        picked = picked.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return opened(picked)
    causal = torch.arange(keys, device=rows.device) <= (rows + keys - queries)[..., None]
    return (causal if mask is None else causal & mask.bool()[:, None])[:, None]
