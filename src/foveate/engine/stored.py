"""What is beside keys and values in a cache takes part in attention: stores, which only we can read, and tallies."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core.store import Turn
from foveate.engine import attention
from foveate.engine.cache import FoveateLayer
from foveate.models.anatomy import Anatomy
from foveate.ops.attention import CHUNK


class Turning:
    """Turns keys as the model does it; layers one behind the other that share positions share the rotary tables."""

    def __init__(self) -> None:
        self._last: tuple[Any, Tensor, tuple[Tensor, Tensor]] | None = None

    def of(self, anatomy: Anatomy, layer: int) -> Turn:
        """The rotation of a layer."""
        return partial(self._turn, anatomy, layer)

    def _turn(self, anatomy: Anatomy, layer: int, x: Tensor, positions: Tensor) -> Tensor:
        kind = (anatomy.config.layer_types[layer] if anatomy.typed_rotary else None, x.dtype, x.device)
        if self._last is None or self._last[0] != kind or self._last[1] is not positions:
            self._last = kind, positions, anatomy.rotary(layer, x, positions.to(x.device, torch.long))
        # The model turns queries and keys at once; one head stands in for queries.
        return anatomy.rotate(layer, x[:, :1], x, self._last[2])[1]


def watch(cache: Any, query: Tensor, key: Tensor, mask: Tensor | None, scale: float, asking: Tensor | None = None) -> None:
    """Let a layer's tally, where there is one, see the attention that the rows give; ``asking`` ``[B, q]``: which count."""
    if not isinstance(cache, FoveateLayer) or cache.tally is None:
        return
    for start in range(0, query.shape[2], CHUNK):
        chunk = slice(start, start + CHUNK)
        allowed = _allowed(query, key, mask, chunk)
        if asking is not None:
            there = asking[:, None, chunk, None]
            allowed = there if allowed is None else allowed & there
        cache.tally = cache.tally.seen(query[:, :, chunk], key, allowed, scale)


def attend(
    cache: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, turn: Turn
) -> Tensor | None:
    """Attention over a layer's store and what lies beside it; None where it has none."""
    if not isinstance(cache, FoveateLayer) or cache.store is None:
        return None
    return cache.store.attend(query, key, value, _allowed(query, key, mask), scale, turn)


def _allowed(query: Tensor, key: Tensor, mask: Tensor | None, rows: slice = slice(None)) -> Tensor | None:
    """``[B, 1 or H, q, K]`` bool: which keys some of the query rows see; None = all."""
    if mask is not None and mask.ndim == 4:
        return attention.opened(mask[:, :, rows])
    if mask is None and query.shape[2] == 1:
        return None
    chosen = torch.arange(query.shape[2], device=query.device)[rows].expand(query.shape[0], -1)
    return attention.visible(mask, chosen, query.shape[2], key.shape[2])
