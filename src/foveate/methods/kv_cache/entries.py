"""Which cached entries may go, and the best of them: what owners of the cache share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.roles import VISUAL
from foveate.ops.select import top_k

Evictable = Literal["all", "visual"]
"""Entries that may go: of the whole prompt, or of its pictures only."""


def evictable(layout: Layout, tokens: Evictable) -> tuple[Tensor, tuple[int, ...]]:
    """``[B, n]`` bool: entries that may go, and how many they are of each sample."""
    return (layout.valid, layout.live) if tokens == "all" else (layout.rows(*VISUAL), layout.visual)


def best_entries(scores: Tensor, valid: Tensor, counts: Sequence[int]) -> Tensor:
    """The ``counts[b]`` best entries of each head, ascending: ``[B, Hkv, max(counts)]``, -1 = padding, on the left."""
    width = max(counts)
    best = top_k(scores.masked_fill(~valid[:, None], float("-inf")), width)
    spare = torch.arange(width, device=scores.device) >= upload(counts, scores.device)[:, None]
    return best.masked_fill(spare[:, None], -1).sort(dim=-1).values


def last_entries(valid: Tensor, counts: Sequence[int]) -> Tensor:
    """``[B, n]`` bool: the last ``counts[b]`` of the entries that are ``valid`` ``[B, n]``."""
    after = valid.flip(1).cumsum(1).flip(1)
    return valid & (after <= upload(counts, valid.device)[:, None])


def kept(scores: Tensor, layout: Layout, tokens: Evictable, counts: Sequence[int]) -> Kept | None:
    """What stays: the ``counts[b]`` best entries of those that may go, and all others. None where that is everything.

    A prompt that ends in its picture keeps its last entry among them.

    Args:
        scores: ``[B, Hkv or 1, n]``, of the entries that may go.
        layout: of the entries.
        tokens: which may go.
        counts: how many of them stay, of each sample, for each head.
    """
    candidates, there = evictable(layout, tokens)
    staying = tuple(live - of + count for live, of, count in zip(layout.live, there, counts))
    if staying == layout.live:
        return None
    if tokens == "visual":
        scores = scores.masked_fill((~candidates | layout.predicting)[:, None], float("inf"))
    return Kept(best_entries(scores, layout.valid, staying), counts=staying)
