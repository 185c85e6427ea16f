"""The physical limit: the same layers, fed only the rows that live, with no scoring and no hooks."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from saccade.core.report import Report
from saccade.models.anatomy import Anatomy, anatomy


def prefill(parts: Anatomy, report: Report) -> Callable[[], Tensor]:
    """A function that runs the decoder layers once on random states, each layer on as many rows as ``report`` counted.

    Frozen rows only make keys and values. The model must have no session attached, or its hooks would be timed too.
    """
    device = parts.home
    dtype = next(parts.layers[0].parameters()).dtype
    rows = [math.ceil(count) for count in report.rows]
    active = [math.ceil(count) for count in report.active]
    states = torch.randn(report.samples, rows[0], parts.config.hidden_size, device=device, dtype=dtype)

    @torch.no_grad()
    def run() -> Tensor:
        x, cache = states, DynamicCache(config=parts.config)
        tables: dict[Any, tuple[Tensor, Tensor]] = {}
        for layer, module in enumerate(parts.layers):
            x = x[:, : rows[layer]]
            kind = (parts.config.layer_types[layer] if parts.typed_rotary else None, rows[layer])
            if kind not in tables:
                positions = torch.arange(rows[layer], device=device).expand(max(parts.rotary_rows, 1), report.samples, -1)
                tables[kind] = parts.rotary(layer, x, positions)
            x = _layer(parts, layer, module, x, active[layer], tables[kind], cache)
        return parts.language_model.norm(x)  # type: ignore[no-any-return, operator]

    return run


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
