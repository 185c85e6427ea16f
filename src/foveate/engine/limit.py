"""The physical limit: the same layers, fed only the rows (and a cache of only the entries) that live.

No scoring, no session: what a session does in the layers would be timed, too. Layers with a recurrent state
are not covered.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foveate.core.report import Report
from foveate.engine.cache import FoveateLayer
from foveate.models import anatomy
from foveate.models.anatomy import Anatomy


def prefill(parts: Anatomy, report: Report) -> Callable[[], Tensor]:
    """A function that runs the decoder layers once on random states, each layer on as many rows as ``report`` counted.

    Frozen rows only make keys and values; rows that skip a layer cost nothing there.
    """
    rows = [math.ceil(count) for count in report.rows]
    active = [math.ceil(count) for count in report.active]
    states = _states(parts, report.samples, max(rows))

    @torch.no_grad()
    def run() -> Tensor:
        x, cache, tables = states, DynamicCache(config=parts.config), _Tables(parts)
        for layer, module in enumerate(parts.layers):
            # Rows that skipped earlier layers come back as they were.
            x = (x if rows[layer] <= x.shape[1] else states)[:, : rows[layer]]
            x = _layer(parts, layer, module, x, active[layer], tables.of(layer, x), cache)
        return parts.norm(None)(x)

    return run


@torch.no_grad()
def decode(parts: Anatomy, samples: int, entries: Sequence[float], steps: int) -> Callable[[], Tensor]:
    """A function that runs the decoder layers on ``steps`` tokens, one by one, over a plain cache.

    ``entries`` are what each layer's cache holds before the first of them, on average over samples and heads (see `held`).
    """
    counts = [math.ceil(count) for count in entries]
    states, first = _states(parts, samples, max(counts)), _Tables(parts)
    stored = [parts.keys_values(layer, states[:, :n], first.of(layer, states[:, :n])) for layer, n in enumerate(counts)]

    @torch.no_grad()
    def run() -> Tensor:
        cache = DynamicCache(config=parts.config)
        for layer, (keys, values) in enumerate(stored):
            cache.update(keys, values, layer)
        for step in range(steps):
            x, tables = states[:, :1], _Tables(parts, first=max(counts) + step)
            for layer, module in enumerate(parts.layers):
                x = module(x, position_embeddings=tables.of(layer, x), past_key_values=cache, use_cache=True)
            x = parts.norm(None)(x)
        return x

    return run


def held(cache: DynamicCache) -> list[float]:
    """Entries that attention reads in each layer, on average over samples and heads."""
    return [layer.held if isinstance(layer, FoveateLayer) else float(layer.get_seq_length()) for layer in cache.layers]


def prefill_seconds(model: nn.Module, report: Report, repeats: int = 5) -> float:
    """Median seconds of `prefill` over ``repeats`` runs, after one to warm up."""
    run = prefill(anatomy(model), report)
    run()
    return statistics.median(timed(run) for _ in range(repeats))


def timed(run: Callable[[], Any]) -> float:
    """Seconds that ``run`` takes, GPU work included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


class _Tables:
    """Rotary tables of consecutive positions, shared by layers that can share them."""

    def __init__(self, parts: Anatomy, first: int = 0) -> None:
        self._parts, self._first = parts, first
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}

    def of(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the rows ``x`` ``[B, n, D]``."""
        parts, rows = self._parts, x.shape[1]
        kind = (parts.config.layer_types[layer] if parts.typed_rotary else None, rows)
        if kind not in self._made:
            positions = torch.arange(self._first, self._first + rows, device=x.device)
            self._made[kind] = parts.rotary(layer, x, positions.expand(max(parts.rotary_rows, 1), x.shape[0], -1))
        return self._made[kind]


def _states(parts: Anatomy, samples: int, rows: int) -> Tensor:
    device = next(parts.layers[0].parameters()).device
    return torch.randn(samples, rows, parts.config.hidden_size, device=device, dtype=parts.dtype)


def _layer(
    parts: Anatomy,
    layer: int,
    module: nn.Module,
    x: Tensor,
    active: int,
    rope: tuple[Tensor, Tensor],
    cache: DynamicCache,
) -> Tensor:
    rest = x.shape[1] - active
    if rest == 0:
        return module(x, position_embeddings=rope, past_key_values=cache, use_cache=True)  # type: ignore[no-any-return]
    frozen, running = ((rope[0][:, part], rope[1][:, part]) for part in (slice(rest), slice(rest, None)))
    cache.update(*parts.keys_values(layer, x[:, :rest], frozen), layer)
    mask = torch.ones(1, 1, active, x.shape[1], dtype=torch.bool, device=x.device).tril(rest)
    out = module(x[:, rest:], attention_mask=mask, position_embeddings=running, past_key_values=cache, use_cache=True)
    return torch.cat([x[:, :rest].to(out.device), out], dim=1)
