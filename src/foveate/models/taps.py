"""Takes part in attention calls of single modules, beside whatever else runs meanwhile.

The attention function of transformers is wrapped under its own name in its *local* mapping, for as long as somebody needs
it: the model's configuration stays as it is, masks are made as before, and what somebody else put there is called and comes
back. All who take part share one wrapper, so those of other threads and models come and go in any order.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from foveate.core.errors import FoveateError

TAP = "_foveate_tap"
"""Attribute of an attention module that listens there."""

Tap = Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor | None]
"""Called with query ``[B, H, q, d]``, key and value ``[B, Hkv, K, d]`` (both rotated), mask and scale of one attention call;
the output ``[B, H, q, d]`` if it takes the fused kernel's place."""

STUB = "_foveate_stub"
"""Attribute of an attention module whose attention function is another: called as transformers calls its own."""

BEYOND = {"s_aux": "sinks", "softcap": "a soft cap"}
"""Arguments of attention functions that say what our own attention over a store does not know."""

_LOCK = threading.Lock()
_OPEN: dict[str, int] = {}
_REPLACED: dict[str, Callable[..., Any] | None] = {}


@contextmanager
def tapped(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Meanwhile the taps and stubs of attention ``modules`` are called."""
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
    """Calls a module's stub, or its tap and the function whose place it takes."""

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
        stub: Callable[..., Any] | None = module.__dict__.get(STUB)
        if stub is not None:
            return stub(module, query, key, value, attention_mask, *args, **kwargs)
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
