"""Reads attention beside the fused kernel: only the rows or column sums that were asked for.

The attention function of transformers is wrapped under its own name in its *local* mapping: the model's configuration stays
as it is, masks are made as before, and removing the entry restores everything.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saccade.core.signal import Attention
from saccade.ops.attention import columns, row_logits

Listener = Callable[[Tensor, Tensor, float, Tensor | None], None]
"""Called with query ``[B, H, q, d]``, key ``[B, Hkv, K, d]`` (both rotated), scale and mask of one attention call."""

_LISTENERS: weakref.WeakKeyDictionary[nn.Module, Listener] = weakref.WeakKeyDictionary()
_WRAPPED: dict[str, int] = {}


class Probe:
    """Listens to attention modules until closed."""

    def __init__(self, listeners: dict[nn.Module, Listener]) -> None:
        self._modules = list(listeners)
        self._kernels = {module.config._attn_implementation for module in listeners}
        _LISTENERS.update(listeners)
        for kernel in self._kernels:
            if not _WRAPPED.get(kernel):
                ALL_ATTENTION_FUNCTIONS[kernel] = _wrap(kernel)
            _WRAPPED[kernel] = _WRAPPED.get(kernel, 0) + 1

    def close(self) -> None:
        """Stop listening and restore the attention functions."""
        for module in self._modules:
            _LISTENERS.pop(module, None)
        for kernel in self._kernels:
            _WRAPPED[kernel] -= 1
            if not _WRAPPED[kernel]:
                del ALL_ATTENTION_FUNCTIONS[kernel]
        self._modules, self._kernels = [], set()


def last_rows(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, count: int, end: Tensor | None) -> Attention:
    """Attention of the last ``count`` query rows of each sample, over all ``K`` keys.

    ``end`` ``[B]`` is one past each sample's last row, None where all end at the last row.
    """
    total = query.shape[2]
    count = min(count, total)
    if end is None:
        rows = torch.arange(total - count, total, device=query.device).expand(query.shape[0], -1)
        chosen = query[:, :, total - count :]
    else:
        rows = (end[:, None] + torch.arange(-count, 0, device=query.device)).clamp(min=0)
        chosen = query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    logits = row_logits(chosen, key, scale)
    logits = logits.masked_fill(~visible(mask, rows, total, key.shape[2]), float("-inf"))
    return Attention(logits, logits.logsumexp(-1))


def received(query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """Attention received by each key under the layer's mask: ``[B, K]``."""
    rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    allowed = visible(mask, rows, query.shape[2], key.shape[2])
    return columns(query, key, scale, allowed[:, 0])


def visible(mask: Tensor | None, rows: Tensor, queries: int, keys: int) -> Tensor:
    """``[B, 1 or H, r, K]`` bool: which keys the query rows ``rows`` ``[B, r]`` may see."""
    if mask is not None and mask.ndim == 4:
        picked = mask.expand(rows.shape[0], -1, -1, -1)
        picked = picked.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
        return picked if picked.dtype == torch.bool else picked > torch.finfo(picked.dtype).min / 2
    causal = torch.arange(keys, device=rows.device) <= (rows + keys - queries)[..., None]
    return (causal if mask is None else causal & mask.bool()[:, None])[:, None]


def _wrap(kernel: str) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        listener = _LISTENERS.get(module)
        if listener is not None:
            scale = kwargs.get("scaling")
            listener(query, key, query.shape[-1] ** -0.5 if scale is None else scale, attention_mask)
        return _original(kernel, module)(module, query, key, value, attention_mask, *args, **kwargs)

    return attention


def _original(kernel: str, module: nn.Module) -> Callable[..., Any]:
    if kernel != "eager":
        return ALL_ATTENTION_FUNCTIONS._global_mapping[kernel]
    # "eager" is in no mapping: each model file brings its own.
    for kind in type(module).__mro__:
        found = vars(sys.modules[kind.__module__]).get("eager_attention_forward")
        if found is not None:
            return found
    raise LookupError(f"no eager attention in the file of {type(module).__name__}")
