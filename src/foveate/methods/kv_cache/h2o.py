"""H2O: keep the cached entries that have received most attention so far, and the latest ones.

Paper: "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models", arXiv 2306.14048. The scores
of a prompt go on growing with every token that is generated, and each of them evicts, in every head, the entry with the
least, so the cache stays as large as it was behind the prompt. ``recent=0.0, received="mean", steps=False`` is
"ObservedAttention" of NVIDIA/kvpress: nothing is kept for being recent, sums are divided by the number of queries that see
an entry, and what is generated stays. Differs from the released code: entries are freed, not masked (its mask leaves the
entry that is about to cease being recent out for one step); a key-value head of grouped attention keeps one set, by the
mean over its query heads, as in kvpress; ``keep`` and ``recent`` stand for its two ratios, ``(1 - recent) * keep`` and
``recent * keep``, whose sum is rounded down once. No eager attention is needed: sums are made beside the fused kernel. Rows
of a later turn count and stay, and from then on as many entries are held. Sums are exact where attention is causal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept
from foveate.core.parameters import In, Keep
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Columns, Seen, Signal, Site
from foveate.core.tally import Tally
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.methods.kv_cache.entries import Evictable, best_entries, evictable, kept, last_entries
from foveate.ops.attention import CHUNK


def summed(means: Tensor, valid: Tensor) -> Tensor:
    """Attention received by each entry, summed over queries: ``[B, Hkv, n]``.

    Args:
        means: ``[B, Hkv, n]`` over the queries that see the entry.
        valid: ``[B, n]`` bool: no padding.
    """
    seen_by = valid.flip(1).cumsum(1).flip(1)
    return means * (seen_by * valid)[:, None]


@register
@dataclass(frozen=True)
class H2O(Cache):
    """Keep the entries with the most attention so far, and the latest ones, of prompts and of answers."""

    name = "h2o"
    title = "H2O"
    group = "kv_cache"
    paper = "arXiv 2306.14048"
    helps = "Long answers under a fixed size of the cache: what is attended to stays, old or new; a common baseline."
    needs = ("decoder attention columns (all layers)", "cache ownership")
    identity_at = {"keep": 1.0, "steps": False}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the entries that may go, or how many of them, that stays in every layer, for each key-value head."""
    recent: Annotated[float, In(0, 1)] = 0.5
    """Share of what stays that is the latest, whatever attention it has received."""
    received: Literal["sum", "mean"] = "sum"
    """Whether attention is summed over queries, or its mean is taken over those that see the entry (``"mean"``, kvpress)."""
    steps: bool = True
    """Whether each step of decoding evicts an entry, too; if not, what is generated stays."""
    tokens: Evictable = "all"
    """Entries that may go: text and pictures alike, as published, or only those of pictures (``"visual"``)."""

    def __post_init__(self) -> None:
        """Steps go by sums, and by all that is held."""
        super().__post_init__()
        self.require(not self.steps or self.received == "sum", "received", "must be 'sum' where steps=True")
        self.require(not self.steps or self.tokens == "all", "tokens", "must be 'all' where steps=True")

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention received, by head, in every layer whose cache may shrink."""
        skipped = {*traits.recurrent, *traits.sliding}
        return tuple(_columns(layer) for layer in range(traits.decoder_layers) if layer not in skipped)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How much of the budget is for what is recent."""
        return {"recent": (0.0, 0.25, 0.5, 0.75)}

    def workspace(self, shape: Shape) -> int:
        """Attention of a chunk of queries; which entries all layers hold, with their sums; a layer's cache as it shrinks."""
        entries = 4 * (shape.layers + 3) * shape.entries
        return shape.edits + shape.attention(CHUNK) + 2 * shape.masks + entries + 2 * shape.keys

    @property
    def stepwise(self) -> bool:
        """Where nothing goes in steps, tokens can be taken back."""
        return self.steps

    @property
    def layer_by_layer(self) -> bool:
        """The budget is the same for all layers."""
        return True

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Attention received ``[B, Hkv, n]``."""
        means = seen[_columns(layer)].transpose(1, 2)
        return ranked(means if self.received == "mean" else summed(means, layout.valid))

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """What is recent, and the best of the rest."""
        return [None if score is None else self._kept(score, layout) for score, layout in zip(scores, layouts)]

    def _kept(self, score: Tensor, layout: Layout) -> Kept | None:
        candidates, there = evictable(layout, self.tokens)
        counts = [Budget(self.keep, "floor").of(count) for count in there]
        recent = [self._recent(count) for count in there]
        latest = last_entries(candidates, recent)
        found = kept(score.masked_fill(latest[:, None], float("inf")), layout, self.tokens, counts)
        if not self.steps:
            return found
        if found is None:  # then as many entries are held from now on
            found = Kept(best_entries(score, layout.valid, layout.live), counts=layout.live)
        received = score.gather(2, found.entries.clamp(min=0))
        return replace(found, tally=Tally(received, upload(recent, score.device)[:, None, None]))

    def _recent(self, count: int) -> int:
        kept = min(self.keep, count) if isinstance(self.keep, int) else self.keep * count
        return int(kept * self.recent)


def _columns(layer: int) -> Columns:
    return Columns(Site("decoder", layer), by_head=True)
