"""Random cached entries: the baseline that every other owner of the cache has to beat.

As RandomPress of NVIDIA/kvpress without a seed of its own: each layer and each key-value head draws for itself, and nothing
is kept apart, neither first entries nor the latest ones. (With a seed, that press draws the same in every layer.) Here the
draw follows from the session's seed, the layer, and how many entries of a prompt may go: a sample keeps the same ones alone,
in a batch, and in every beam.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept
from foveate.core.parameters import Keep
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Seed, Seen, Signal
from foveate.core.traits import Traits
from foveate.methods.kv_cache.entries import Evictable, evictable, kept
from foveate.ops.draw import chances


def random_scores(candidates: Tensor, counts: Sequence[int], heads: int, seed: int, layer: int) -> Tensor:
    """Random scores, by head.

    Args:
        candidates: ``[B, n]`` bool, entries that may go.
        counts: how many they are of each sample.
        heads: key-value heads.
        seed: of the session.
        layer: of the decoder.

    Returns:
        ``[B, heads, n]`` float32 in [0, 1); what is no candidate has any of them.
    """
    drawn = torch.zeros(len(counts), heads, max(1, *counts))
    for sample, count in enumerate(counts):
        drawn[sample, :, :count] = chances(count, heads, seed, layer)
    # By number among the candidates, so that padding does not change them.
    number = (candidates.cumsum(1) - 1).clamp(min=0)
    return upload(drawn, candidates.device).gather(2, number[:, None].expand(-1, heads, -1))


@register
@dataclass(frozen=True)
class RandomKV(Cache):
    """Keep a random share of every layer's cached entries, drawn for each key-value head."""

    name = "random_kv"
    title = "Random cache entries"
    group = "kv_cache"
    paper = "baseline"
    helps = "As a baseline: what another owner of the cache keeps of the score beyond this one is what its choice is worth."
    needs = ("cache ownership",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the entries that may go, or how many of them, that stays in every layer, for each key-value head."""
    tokens: Evictable = "all"
    """Entries that may go: text and pictures alike, or only those of pictures (``"visual"``)."""

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Nothing of the model."""
        return (Seed(),)

    def workspace(self, shape: Shape) -> int:
        """Scores and cache of one layer while it shrinks; which entries all layers hold."""
        return shape.edits + 2 * (shape.layers + 3) * shape.entries + 2 * shape.keys

    @property
    def layer_by_layer(self) -> bool:
        """The budget is the same for all layers."""
        return True

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """One draw for each layer and head."""
        candidates, counts = evictable(layout, self.tokens)
        return random_scores(candidates, counts, keys.shape[1], seen[Seed()], layer)

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """As many as each layer may keep, those with the largest scores."""
        budget, found = Budget(self.keep, "floor"), list[Kept | None]([None] * len(scores))
        for layer, (score, layout) in enumerate(zip(scores, layouts, strict=True)):
            if score is not None:
                there = evictable(layout, self.tokens)[1]
                found[layer] = kept(score, layout, self.tokens, tuple(map(budget.of, there)))
        return found
