"""Work of the language model's layers, counted from shapes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def layer_flops(config: Any, rows: int, active: int | None = None, experts: int | None = None) -> float:
    """FLOPs of the matrix products of one decoder layer that reads ``rows`` tokens, two for each multiply-add.

    Only ``active`` rows (all by default) have a query, an output projection and an MLP. In a layer with experts instead of
    an MLP, ``experts`` of them run, counted over all rows. Attention is counted in full, not halved for causality.
    """
    queries = rows if active is None else active
    width, heads = config.hidden_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    projections = 2 * width * head * (2 * kv_heads * rows + 2 * heads * queries)
    attention = 4 * heads * head * queries * rows
    if experts is None:
        mlp = 6 * width * config.intermediate_size * queries
    else:
        inside = getattr(config, "moe_intermediate_size", None) or config.intermediate_size
        choices = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", 0)
        mlp = 6 * width * inside * experts + 2 * width * choices * queries
    return float(projections + attention + mlp)


def prefill_flops(
    config: Any,
    rows: Sequence[Sequence[int]],
    active: Sequence[Sequence[int]],
    experts: Mapping[int, Sequence[int]],
) -> float:
    """FLOPs of a prefill: live and active rows by layer and sample, and experts run by each layer that has them."""
    return sum(
        layer_flops(config, n, a, ran)
        for layer, (live, running) in enumerate(zip(rows, active))
        for n, a, ran in zip(live, running, experts.get(layer, [None] * len(live)))
    )
