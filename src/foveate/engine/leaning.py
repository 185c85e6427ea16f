"""Attention of the layers in which a method adds a bias to pairs of row and key, some queries at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from foveate.core.errors import FoveateError
from foveate.core.leaning import Leaning
from foveate.core.signal import Signal
from foveate.core.state import State
from foveate.engine.attention import visible
from foveate.engine.cache import FoveateLayer
from foveate.engine.clock import Clock
from foveate.engine.program import Program
from foveate.engine.rows import Rows
from foveate.ops.attention import CHUNK, row_logits


class Leant:
    """What methods add to the attention of one forward; ``acted`` takes those that have added something."""

    def __init__(self, program: Program, rows: Rows, clock: Clock, acted: set[Any]) -> None:
        self._program, self._rows, self._clock, self._acted = program, rows, clock, acted

    def attend(
        self,
        layer: int,
        cache: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scale: float,
        read: Callable[[Leaning], Mapping[Signal, Any]],
        state: State,
    ) -> Tensor | None:
        """The output ``[B, H, q, d]`` of the attention of ``layer`` with what its methods add; None if none adds anything.

        ``query`` ``[B, H, q, d]``, ``key`` and ``value`` ``[B, Hkv, K, d]``, of which the last q are the rows' own.
        """
        methods = self._program.leaning.get(layer)
        if methods is None or self._rows.given == 1 or not self._rows.has_pictures:
            return None
        count, width, layout = query.shape[2], key.shape[2], self._rows.layout
        parts: list[Tensor] = []
        for start in range(0, count, CHUNK):
            rows = slice(start, min(start + CHUNK, count))
            asking = torch.arange(rows.start, rows.stop, device=query.device).expand(len(query), -1)
            allowed = visible(mask, asking, count, width)
            # A padding row may see nothing, of which a softmax makes NaN: it looks at itself.
            itself = torch.arange(width, device=query.device) == asking[0][:, None] + width - count
            allowed = allowed | (itself & ~allowed.any(-1, keepdim=True))
            logits = row_logits(query[:, :, rows], key, scale).masked_fill(~allowed, float("-inf"))
            with self._clock.lap("method"):
                told = [(m, m.bias(layer, logits, rows, layout, read(m), state)) for m in methods]
            added = [bias for _, bias in told if bias is not None]
            if not added:
                return None
            self._acted.update(method for method, bias in told if bias is not None)
            bias = sum(added[1:], added[0]).to(query.dtype).expand_as(logits).masked_fill(~allowed, float("-inf"))
            grouped = key.shape[1] != query.shape[1]
            parts.append(scaled_dot_product_attention(query[:, :, rows], key, value, bias, scale=scale, enable_gqa=grouped))
        if isinstance(cache, FoveateLayer) and cache.store is not None:
            raise FoveateError(
                f"past_key_values: decoder layer {layer} holds entries in a store, where {methods[0].name} cannot add to "
                "attention; start with a new cache"
            )
        return torch.cat(parts, dim=2)
