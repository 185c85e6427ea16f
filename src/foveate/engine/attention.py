"""Reads attention beside the fused kernel: only the rows or column sums that were asked for.

The attention function of transformers is wrapped under its own name in its *local* mapping, for as long as a forward needs
it: the model's configuration stays as it is, masks are made as before, and what somebody else put there is called and comes
back.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.errors import FoveateError
from foveate.core.signal import Attention
from foveate.ops.attention import columns, row_logits

TAP = "_foveate_tap"
"""Attribute of an attention module that listens there."""

Tap = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
"""Called with query ``[B, H, q, d]``, key and value ``[B, Hkv, K, d]`` (both rotated), mask and scale of one attention call;
the output ``[B, H, q, d]`` if it takes the fused kernel's place."""

BEYOND = {"s_aux": "sinks", "softcap": "a soft cap"}
"""Arguments of attention functions that say what our own attention over a store does not know."""

_LOCK = threading.Lock()
_OPEN: dict[str, int] = {}
_REPLACED: dict[str, Callable[..., Any] | None] = {}


@contextmanager
def tapped(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile the taps of attention ``modules`` are called."""
    kernels = {module.config._attn_implementation for module in modules}
    for kernel in kernels:
        _open(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            _close(kernel)


def _open(kernel: str) -> None:
    with _LOCK:
        _OPEN[kernel] = _OPEN.get(kernel, 0) + 1
        mine = ALL_ATTENTION_FUNCTIONS._local_mapping
        current = mine.get(kernel)
        if not isinstance(current, _Wrapper):
            _REPLACED[kernel] = current
            mine[kernel] = _Wrapper(kernel)


def _close(kernel: str) -> None:
    with _LOCK:
        _OPEN[kernel] -= 1
        mine = ALL_ATTENTION_FUNCTIONS._local_mapping
        if _OPEN[kernel] or not isinstance(mine.get(kernel), _Wrapper):
            return
        before = _REPLACED.pop(kernel)
        if before is None:
            del mine[kernel]
        else:
            mine[kernel] = before


class _Wrapper:
    """Calls a module's tap, and the function whose place it takes."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        tap: Tap | None = module.__dict__.get(TAP)
        if tap is not None:
            scale = kwargs.get("scaling")
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            output = tap(query, key, value, attention_mask, scale)
            if output is not None:
                unknown = [what for name, what in BEYOND.items() if kwargs.get(name) is not None]
                if unknown:
                    raise FoveateError(
                        f"past_key_values: entries of the cache are in a store, where attention with {unknown[0]} cannot be "
                        "read; start with a new cache"
                    )
                return output.transpose(1, 2).contiguous(), None
        return self._original(module)(module, query, key, value, attention_mask, *args, **kwargs)

    def _original(self, module: nn.Module) -> Callable[..., Any]:
        replaced = _REPLACED.get(self.kernel)
        if replaced is not None:
            return replaced
        if self.kernel != "eager":
            return ALL_ATTENTION_FUNCTIONS._global_mapping[self.kernel]  # type: ignore[no-any-return]
        return _eager(module)


def function_of(module: nn.Module) -> Callable[..., Any]:
    """The attention function that a module calls, as it is now."""
    kernel: str = module.config._attn_implementation  # type: ignore[union-attr, assignment]
    found: Callable[..., Any] | None = ALL_ATTENTION_FUNCTIONS.get(kernel)
    return _eager(module) if found is None else found


def _eager(module: nn.Module) -> Callable[..., Any]:
    """The function called "eager", which is in no mapping: each model file brings its own."""
    for kind in type(module).__mro__:
        found = vars(sys.modules[kind.__module__]).get("eager_attention_forward")
        if found is not None:
            return found  # type: ignore[no-any-return]
    raise LookupError(f"no eager attention in the file of {type(module).__name__}")


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
