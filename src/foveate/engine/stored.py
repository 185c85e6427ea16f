"""Attention over a cache some of whose entries are in a store, which only we can read."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from foveate.core.store import Turn
from foveate.engine import attention
from foveate.engine.cache import FoveateLayer
from foveate.models.anatomy import Anatomy


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


def attend(
    cache: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, turn: Turn
) -> Tensor | None:
    """Attention over a layer's store and what lies beside it; None where it has none."""
    if not isinstance(cache, FoveateLayer) or cache.store is None:
        return None
    allowed = None
    if mask is not None and mask.ndim == 4:
        allowed = attention.opened(mask)
    elif mask is not None or query.shape[2] > 1:
        rows = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
        allowed = attention.visible(mask, rows, query.shape[2], key.shape[2])
    return cache.store.attend(query, key, value, allowed, scale, turn)
