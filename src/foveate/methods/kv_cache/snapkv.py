"""SnapKV: keep the cached entries that the last queries of the prompt attend to.

Paper: "SnapKV: LLM Knows What You are Looking for Before Generation", arXiv 2404.14469. Follows NVIDIA/kvpress: the budget
is a share of the prompt, and every key-value head keeps its own set (the original code has a fixed capacity and a set for
each query head). Blind to modality: text and image entries compete, unless ``tokens="visual"`` spares the text. Prompts not
longer than the window are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept
from foveate.core.parameters import AtLeast, Keep, Odd
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Rows, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.methods.kv_cache.entries import Evictable, evictable, kept, last_entries


def window_scores(
    attention: Tensor, window: Tensor, kv_heads: int, kernel: int, pooling: Literal["average", "max"] = "average"
) -> Tensor:
    """Pooled attention of the window's queries, by key-value head.

    Args:
        attention: ``[B, H, w, n]`` probabilities of the last w queries.
        window: ``[B, n]`` bool, the rows of those queries: they always stay.
        kv_heads: key-value heads, H divisible by it.
        kernel: width of the pooling along the sequence, odd.
        pooling: its kind.

    Returns:
        ``[B, Hkv, n]`` float32; window rows score 1 above the largest of their sample.
    """
    batch, heads, _, keys = attention.shape
    # Zero window columns act as the zero padding at the border of the cut map that the published code pools.
    mean = attention.mean(2).masked_fill(window[:, None], 0)
    pool = torch.nn.functional.avg_pool1d if pooling == "average" else torch.nn.functional.max_pool1d
    pooled = pool(mean, kernel, stride=1, padding=kernel // 2)
    grouped = pooled.reshape(batch, kv_heads, heads // kv_heads, keys).mean(2)
    return torch.where(window[:, None], grouped.amax((1, 2), keepdim=True) + 1, grouped)


@register
@dataclass(frozen=True)
class SnapKV(Cache):
    """Keep a share of every layer's cached entries, chosen for each key-value head."""

    name = "snapkv"
    title = "SnapKV"
    group = "kv_cache"
    paper = "arXiv 2404.14469"
    helps = "Long answers and long prompts: what the question does not attend to need not be read at each step."
    needs = ("decoder attention rows (all layers)", "cache ownership")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the entries that may go, or how many of them, that stays in every layer, for each key-value head."""
    window: Annotated[int, AtLeast(1)] = 64
    """Queries at the end of the prompt whose attention counts; their own entries stay. A prompt not longer is left alone."""
    kernel: Annotated[int, Odd()] = 5
    """Width, in entries, of the pooling of scores along the prompt."""
    tokens: Evictable = "all"
    """Entries that may go: text and pictures alike, as published, or only those of pictures (``"visual"``)."""

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The window's rows in every layer."""
        return tuple(Rows(Site("decoder", layer), self.window, keys="cache") for layer in range(traits.decoder_layers))

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Prompts differ in how many rows the question has."""
        return {"window": (8, 16, 32, 64)}

    def workspace(self, shape: Shape) -> int:
        """The window's rows, scores and cache of one layer while it shrinks; which entries all layers hold."""
        entries = 2 * (shape.layers + 3) * shape.entries
        return shape.edits + shape.attention(self.window) + entries + 2 * shape.keys

    @property
    def layer_by_layer(self) -> bool:
        """The budget is the same for all layers."""
        return True

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Scores of one layer; None where the prompt fits into the window."""
        attention: Attention = seen[Rows(Site("decoder", layer), self.window, keys="cache")]
        if layout.shape[1] <= self.window:
            return None
        # A window larger than the budget stays as far as the smallest budget goes, its last rows first.
        candidates, there = evictable(layout, self.tokens)
        staying = last_entries(candidates, [self._count(count, 1, 2) for count in there])
        window = last_entries(layout.valid, [self.window] * len(there)) & (staying | ~candidates)
        return ranked(window_scores(attention.probabilities(), window, keys.shape[1], self.kernel))

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """The best entries of every layer, as many as it may keep."""
        found: list[Kept | None] = [None] * len(scores)
        scored = {layer: score for layer, score in enumerate(scores) if score is not None}
        for depth, (layer, score) in enumerate(scored.items()):
            layout = layouts[layer]
            there = evictable(layout, self.tokens)[1]
            counts = [
                of if live <= self.window else self._count(of, depth, len(scored)) for live, of in zip(layout.live, there)
            ]
            found[layer] = kept(score, layout, self.tokens, counts)
        return found

    def _count(self, entries: int, depth: int, layers: int) -> int:
        """How many of the ``entries`` that may go stay in one of the ``layers`` that are scored, by its depth among them."""
        return Budget(self.keep, "floor").of(entries)
