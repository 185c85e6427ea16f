"""kvpress: a press of NVIDIA's library says which cached entries stay.

Paper: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution", arXiv 2510.00636.
The library is not part of this package: what its own press computes is what counts here. A press is shown the prompt that
came last, sample by sample and without padding; entries of before stay, as kvpress leaves all but a first prompt alone.
Which of the ``tokens`` that may go stay is then up to the scores; presses that part a budget among heads, or take whole
chunks, choose by themselves. Queries, keys and rotary tables are those of the model that is attached, where kvpress knows a
few text models by class. Presses that draw get the same numbers for each sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept
from foveate.core.parameters import Keep
from foveate.core.registry import register
from foveate.core.roles import last_of
from foveate.core.shape import Shape
from foveate.core.signal import Hidden, Scorer, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.methods.kv_cache.entries import Evictable, best_entries, evictable, kept
from foveate.methods.kv_cache.mixkv import ragged_entries

HEADS = ("AdaKVPress", "CriticalAdaKVPress", "LUKVPress")
"""Presses whose heads keep different numbers of entries."""
CHUNKS = ("BlockPress", "ChunkKVPress", "ChunkPress", "EntropyGatedChunkKVPress")
"""Presses that go through the prompt in chunks."""


def earlier(layout: Layout, rows: int) -> tuple[int, ...]:
    """Entries of each sample in front of the last ``rows`` ones; counted on the device where there are any."""
    width = layout.shape[1] - rows
    return tuple(layout.valid[:, :width].sum(1).tolist()) if width else (0,) * len(layout.live)


def latest(layout: Layout, rows: int, before: Sequence[int]) -> Layout:
    """The layout of the last ``rows`` entries, with ``before`` of each sample in front of them."""
    if rows == layout.shape[1]:
        return layout
    names = ("origin", "role", "item", "ordinal", "size")
    parts = {name: getattr(layout, name)[:, -rows:] for name in names}
    live = tuple(n - gone for n, gone in zip(layout.live, before))
    return replace(layout, positions=layout.positions[..., -rows:], live=live, **parts)


@register
@dataclass(frozen=True)
class Press(Cache):
    """Keep the cached entries that a press of the library kvpress scores best, in every layer."""

    name = "press"
    title = "kvpress"
    group = "kv_cache"
    paper = "arXiv 2510.00636"
    helps = "One of kvpress' presses on a vision-language model, or beside the methods that are here."
    needs = ("the library kvpress", "decoder layer inputs", "cache ownership")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    press: str = "KeyDiffPress"
    """The press, with its options as Python writes them: ``"CriticalKVPress(SnapKVPress(window_size=16))"``. Which of them
    run is said in docs/kvpress.md.
    """
    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the entries that may go, or how many of them, that stays in every layer, for each key-value head; of
    presses that choose by themselves the mean over heads, rounded to whole chunks.
    """
    tokens: Evictable | None = None
    """Entries that may go: those of pictures (``"visual"``), or text and pictures alike, as kvpress has it (``"all"``).
    None: the former, but in a text model, which has no pictures, the latter.
    """

    def __post_init__(self) -> None:
        """Chunks know nothing of pictures."""
        super().__post_init__()
        self.require(self.tokens != "visual" or self._outermost not in CHUNKS, "tokens", self._by_chunks)

    def check(self, traits: Traits) -> str | None:
        """Chunks know nothing of pictures, where there are some."""
        if self.tokens is None and traits.sees and self._outermost in CHUNKS:
            return f"tokens=None: stands for 'visual' on this model, and {self._by_chunks}"
        return None

    def fitted(self, traits: Traits) -> Press:
        """Text models have nothing but text."""
        return self if self.tokens else replace(self, tokens="visual" if traits.sees else "all")

    @property
    def by_head(self) -> bool:
        """Some part the budget among heads."""
        return self._outermost in HEADS

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The press and what enters each layer that has attention over the whole prompt."""
        layers = [n for n in range(traits.decoder_layers) if n not in {*traits.sliding, *traits.recurrent}]
        return tuple(s for layer in layers for s in (Scorer(self.press, layer), Hidden(Site("decoder", layer))))

    def workspace(self, shape: Shape) -> int:
        """Copies of keys and values by query head, queries and rotary tables of one layer at once, which entries stay."""
        rows = 3 * shape.hidden + 8 * shape.floats(shape.queries) + 8 * shape.floats(shape.keys)
        return shape.edits + rows + 2 * (shape.layers + 5) * shape.entries

    @property
    def layer_by_layer(self) -> bool:
        """How many entries a press chooses by itself is read from the device once for all layers."""
        return not self._chooses

    @property
    def _by_chunks(self) -> str:
        return f"{self._outermost} takes chunks of text and pictures alike; use tokens='all'"

    @property
    def _evictable(self) -> Evictable:
        return self.tokens or "visual"

    @property
    def _spares_text(self) -> bool:
        return self._evictable == "visual"

    @property
    def _outermost(self) -> str:
        return self.press.partition("(")[0].strip()

    @property
    def _chooses(self) -> bool:
        return self._outermost in HEADS + CHUNKS

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """``[B, Hkv, n]`` the press's scores of the n rows of this prompt, at inf what has to stay; None where all stays."""
        x: Tensor = seen[Hidden(Site("decoder", layer))].to(keys.device)
        before = earlier(layout, x.shape[1])
        there = self._there(layout, before)
        counts = self._counts(there)
        if counts == there:
            return None
        layout = latest(layout, x.shape[1], before)
        keys, values = keys[:, :, -x.shape[1] :], values[:, :, -x.shape[1] :]
        stays = layout.predicting | ~evictable(layout, "visual")[0] if self._spares_text else None
        scores = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        for sample, (live, of, count) in enumerate(zip(layout.live, there, counts)):
            if count == of:
                continue
            rows = slice(None) if layout.dense else last_of(layout.valid[sample : sample + 1], live)[0]
            scores[sample][:, rows] = seen[Scorer(self.press, layer)](
                x[sample, rows][None],
                layout.positions[:, sample, rows][:, None],
                keys[sample][None, :, rows],
                values[sample][None, :, rows],
                of - count,
                None if stays is None else stays[sample, rows][None],
            )[0]
        scores = scores if stays is None else scores.masked_fill(stays[:, None], float("inf"))
        return scores.masked_fill(~layout.valid[:, None], float("-inf"))

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """The best entries of every layer, or those that the press chose."""
        scored = {layer: score for layer, score in enumerate(scores) if score is not None}
        found: list[Kept | None] = [None] * len(scores)
        for layer, score in scored.items():
            layout = layouts[layer]
            before = earlier(layout, score.shape[2])
            front = layout.valid[:, None, : layout.shape[1] - score.shape[2]].expand(-1, score.shape[1], -1)
            scored[layer] = score = torch.cat([torch.where(front, float("inf"), float("-inf")), score], dim=2)
            if not self._chooses:
                counts = self._counts(self._there(layout, before))
                more = (0,) * len(before) if self._spares_text else before
                found[layer] = kept(score, layout, self._evictable, tuple(map(sum, zip(counts, more))))
        if self._chooses and scored:
            totals = [(score > float("-inf")).sum(2) for score in scored.values()]
            for (layer, score), total, counts in zip(scored.items(), totals, torch.stack(totals).tolist()):
                if self.by_head:
                    found[layer] = Kept(ragged_entries(score, total), by_head=tuple(map(tuple, counts)))
                else:
                    live = tuple(heads[0] for heads in counts)
                    found[layer] = Kept(best_entries(score, layouts[layer].valid, live), counts=live)
        return found

    def _there(self, layout: Layout, before: Sequence[int]) -> tuple[int, ...]:
        """Entries of this prompt that may go, of each sample."""
        there = evictable(layout, self._evictable)[1]
        return there if self._spares_text else tuple(n - gone for n, gone in zip(there, before))

    def _counts(self, there: Sequence[int]) -> tuple[int, ...]:
        """How many of them stay."""
        return tuple(map(Budget(self.keep, "floor").of, there))
