"""Reads attention beside the fused kernel: only the rows or column sums that were asked for.

The attention function of transformers is wrapped under its own name in its *local* mapping: the model's configuration stays
as it is, masks are made as before, and removing the entry restores everything.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.signal import Attention
from foveate.ops.attention import columns, row_logits

Listener = Callable[[Tensor, Tensor, float, Tensor | None], None]
"""Called with query ``[B, H, q, d]``, key ``[B, Hkv, K, d]`` (both rotated), scale and mask of one attention call."""

StandIn = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
"""Called with query, key, value, mask and scale; the output ``[B, H, q, d]`` if it takes the fused kernel's place."""

_LISTENERS: weakref.WeakKeyDictionary[nn.Module, Listener] = weakref.WeakKeyDictionary()
_STAND_INS: weakref.WeakKeyDictionary[nn.Module, StandIn] = weakref.WeakKeyDictionary()
_WRAPPED: dict[str, int] = {}


class Probe:
    """Listens to attention modules, and stands in for the fused kernel where a cache is stored by head, until closed."""

    def __init__(
        self, listeners: Mapping[nn.Module, Listener], stand_ins: Mapping[nn.Module, StandIn] | None = None
    ) -> None:
        self._modules = [*listeners, *(stand_ins or {})]
        self._kernels = {module.config._attn_implementation for module in self._modules}
        _LISTENERS.update(listeners)
        _STAND_INS.update(stand_ins or {})
        for kernel in self._kernels:
            if not _WRAPPED.get(kernel):
                ALL_ATTENTION_FUNCTIONS[kernel] = _wrap(kernel)
            _WRAPPED[kernel] = _WRAPPED.get(kernel, 0) + 1

    def close(self) -> None:
        """Stop listening and restore the attention functions."""
        for module in self._modules:
            _LISTENERS.pop(module, None)
            _STAND_INS.pop(module, None)
        for kernel in self._kernels:
            _WRAPPED[kernel] -= 1
            if not _WRAPPED[kernel]:
                del ALL_ATTENTION_FUNCTIONS[kernel]
        self._modules, self._kernels = [], set()


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


def received(
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
        listener, stand_in = _LISTENERS.get(module), _STAND_INS.get(module)
        if listener is not None or stand_in is not None:
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            if listener is not None:
                listener(query, key, scale, attention_mask)
            output = stand_in(query, key, value, attention_mask, scale) if stand_in is not None else None
            if output is not None:
                return output.transpose(1, 2).contiguous(), None
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
