"""SparseVILA: prune visual tokens mildly before the language model, and let decoding read only those the question asks for.

Paper: "SparseVILA: Decoupling Visual Sparsity for Efficient VLM Inference", arXiv 2510.17777. The cache keeps all that was
not pruned: each turn's question retrieves its own visual entries in every layer, the mean over heads and question tokens of
the attention to them, by a softmax over the whole row. Only the authors' column-reduction kernel is public, the rest follows
the paper. Reconstructed: a prompt's images are one pool for retrieval while pruning is by image; every text token behind the
last visual one is the question; retrieval is made once a turn; the encoder layer is the one that feeds the projector (a
secondary source says the last one). Encoders with several summary tokens (RADIO) are not covered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.layout import Edit, Layout
from foveate.core.method import Cache, Entries
from foveate.core.parameters import AtLeast, Keep
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Columns, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import CHUNK
from foveate.ops.select import top_k, top_rows


def column_mean(attention: Attention, queries: Tensor) -> Tensor:
    """Mean ``[B, K]`` of attention rows over heads and the ``queries`` ``[B]`` rows of each sample that are no padding."""
    probabilities = attention.probabilities()
    return probabilities.sum((1, 2)) / (probabilities.shape[1] * queries.clamp(min=1))[:, None]


def retrieve(scores: Tensor, valid: Tensor, visual: Tensor, counts: Sequence[int], dropped: Sequence[int]) -> Tensor:
    """The entries to read: all that are not visual, and the best visual ones.

    Args:
        scores, valid, visual: ``[B, n]`` by entry; entries that are not valid are padding.
        counts: visual entries to read of each sample.
        dropped: visual entries not to read of each sample.

    Returns:
        ``[B, 1, n - min(dropped)]`` ascending, padded with -1 on the left.
    """
    keep = valid & (~visual | top_rows(scores, visual, counts))
    order = keep.to(torch.uint8).argsort(dim=1, stable=True)[:, min(dropped) :]
    return order.masked_fill(~keep.gather(1, order), -1)[:, None]


@register
@dataclass(frozen=True)
class SparseVILA(ItemTokens, Cache):
    """Prune by encoder salience at prefill, retrieve by the question at decoding."""

    name = "sparsevila"
    title = "SparseVILA"
    group = "kv_cache"
    paper = "arXiv 2510.17777"
    helps = (
        "Conversations about one picture: each turn reads what its own question asks for, and leaves the rest to the next."
    )
    needs = ("encoder attention (or keep=1.0)", "decoder attention rows of the question (all layers)", "cache ownership")
    identity_at = {"keep": 1.0, "decode_keep": 1.0}  # noqa: RUF012

    keep: int | float = 0.4
    """Visual tokens that stay at prefill, of each grid (a picture, or one tile or view of it)."""
    decode_keep: Annotated[int | float, Keep()] = 0.25
    """Visual entries that decoding reads, of those that a sample has in the cache."""
    encoder_layer: Annotated[int, AtLeast(0)] | None = None
    """Encoder block whose attention says what is salient, counted from 0; None = the one that feeds the projector."""
    positions: Positions = "auto"
    """``"auto"`` is contiguous where positions are one row and ``"rank"`` under M-RoPE, as in the paper."""

    def check(self, traits: Traits) -> str | None:
        """Pruning needs encoder attention."""
        if self._prunes and traits.encoder_layers is None:
            return (
                f"needs encoder attention, which is not available on {traits.family}; keep=1.0 does without (retrieval only)"
            )
        if self._prunes and self.encoder_layer is not None and self.encoder_layer >= (traits.encoder_layers or 0):
            return f"encoder_layer={self.encoder_layer}: must be in 0..{(traits.encoder_layers or 0) - 1}"
        return super().check(traits)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Salience in one encoder block; the question's rows in every decoder layer with a full cache."""
        signals: list[Signal] = []
        if self._prunes:
            layer = traits.feature_layer if self.encoder_layer is None else self.encoder_layer
            site = Site("encoder", layer or 0)
            signals.append(Rows(site, "cls") if traits.has_cls else Columns(site))
        if not _is_whole(self.decode_keep):
            full = set(range(traits.decoder_layers)) - {*traits.sliding, *traits.recurrent}
            signals += [_question(layer) for layer in sorted(full)]
        return tuple(signals)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """What a turn reads."""
        return {"decode_keep": Range(0.05, 1.0, log=True)}

    def workspace(self, shape: Shape) -> int:
        """The question's rows of one layer, salience in the encoder, and the view beside the whole cache."""
        text = shape.rows - shape.visual
        seen = text + self._decode_budget().of(self.budget().of(shape.visual))
        view = 2 * shape.keys * (shape.layers * seen // shape.rows + 1)
        salience = shape.image_attention(1 if shape.cls else CHUNK) if self._prunes else 0
        return super().workspace(shape) + shape.attention(text) + salience + view

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """The most salient tokens, in raster order."""
        (observed,) = images.seen.values()
        salience = observed.probabilities().mean(1)[:, 0] if isinstance(observed, Attention) else observed
        return top_k(salience, k).sort(dim=1).values

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Prune; under M-RoPE the kept grid is made dense."""
        edit = super().edit(site, x, layout, seen, state)
        if edit is None or self.positions != "auto" or layout.positions.shape[0] == 1:
            return edit
        return replace(edit, positions="rank")

    def view(self, layer: int, entries: Entries, seen: Seen, layout: Layout) -> Tensor | None:
        """Rank all visual entries of a sample by this turn's question."""
        counts = [self._decode_budget().of(count) for count in entries.counts]
        dropped = [count - kept for count, kept in zip(entries.counts, counts)]
        if _question(layer) not in seen or not any(dropped):
            return None
        scores = column_mean(seen[_question(layer)], layout.question.sum(1))
        return retrieve(scores, entries.tokens[:, 0] >= 0, entries.visual[:, 0], counts, dropped)

    @property
    def _prunes(self) -> bool:
        return not _is_whole(self.keep)

    def _decode_budget(self) -> Budget:
        return Budget(self.decode_keep)


def _is_whole(keep: int | float) -> bool:
    return isinstance(keep, float) and keep == 1


def _question(layer: int) -> Rows:
    return Rows(Site("decoder", layer), "question", keys="cache")
