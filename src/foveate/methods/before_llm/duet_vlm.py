"""DUET-VLM: VisionZip that merges only runners-up, then a pyramid inside the LLM by what the whole question attends to.

Paper: "DUET-VLM: Dual Stage Unified Efficient Token Reduction for VLM Training and Inference", arXiv 2602.18846. As the
published code, contextual tokens are made of the best ``pool`` times ``contextual`` tokens behind the dominant ones, every
``pool``-th of which is a target, and what lies behind those is lost; then all text rows behind the pictures ask, at the
layers that begin a stage, under the causal mask (the code for Qwen2.5-VL leaves it out there). Its budgets are averages over
the layers: 170 + 35 tokens are 128 of them, 300 + 7 are 192. Not here: asking by salient words alone, which is off by
default in the code, too. Reconstructed: other depths get their stages at the same shares of it, and each grid of a picture
in tiles has one budget; see `foveate.methods.before_llm.visionzip` for where the first stage acts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, CountOrShare, Keep, Layers, Shares
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Columns, Function, Keys, Rows, Seen, Signal, Site, Summary
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods.before_llm.visionzip import Place, edit_of, on_features, reads_of, refuse_place, zip_bytes
from foveate.ops.attention import CHUNK, from_rows
from foveate.ops.select import top_rows


def asked_for(query: Tensor, key: Tensor, rows: Tensor, prompt: Tensor) -> Tensor:
    """Attention ``[B, N]`` that each row gets from some rows of its prompt: the mean over heads and over those rows.

    Args:
        query, key: ``[B, H or Hkv, N, d]``.
        rows: ``[B, Q]`` those that ask, -1 = padding.
        prompt: ``[B, N]`` bool: rows that may be looked at.
    """
    before = torch.arange(key.shape[2], device=key.device) <= rows[..., None]
    return from_rows(query, key, rows, before & prompt[:, None])


@register
@dataclass(frozen=True)
class DuetVLM(Tokens):
    """Dominant and contextual tokens of each grid; of them the best ``ratios`` before each of ``layers``."""

    name = "duet_vlm"
    title = "DUET-VLM"
    group = "before_llm"
    paper = "arXiv 2602.18846"
    helps = (
        "Very small budgets: what the picture itself calls for is chosen before the LLM, what the question asks for within."
    )
    needs = (
        "encoder attention and keys (1 block)",
        "features with CLS, or projected tokens",
        "decoder queries and keys (1 layer for each stage)",
    )
    identity_at = {"dominant": 1.0, "layers": None, "ratios": (1.0, 1.0)}  # noqa: RUF012

    dominant: Annotated[int | float, Keep()] = 170
    """Tokens of each grid (a picture, or one tile or view of it) that go to the language model as they are, CLS included; a
    count, or a share of the grid."""
    contextual: Annotated[int | float, CountOrShare("the tokens of a grid")] = 35
    """Tokens that others are merged into, beside them; with ``dominant`` as many as a grid has or more, it stays whole."""
    pool: Annotated[int, AtLeast(1)] = 4
    """How many tokens, the best behind the dominant ones, make one contextual token; 1 = none is merged."""
    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Decoder layers before which tokens are dropped, counted from 0; None = 16 and 24 of 32."""
    ratios: Annotated[tuple[float, ...], Shares()] = (0.5, 0.0)
    """Share of the tokens that entered the language model that stays from each of them on."""
    place: Place | None = None
    """Whether the first stage works on what the projector is fed, CLS included (``"features"``), or on what the language
    model gets (``"embeddings"``); None = the first where the model allows it."""
    positions: Positions = "auto"
    """Rotary positions of what stays in the language model: renumbered at every stage where they are one row
    (``"contiguous"``), else their own."""

    def fitted(self, traits: Traits) -> Self:
        """Stages at the published shares of the depth."""
        return replace(self, layers=self.layers or traits.same_depth((16, 24), of=32))

    def check(self, traits: Traits) -> str | None:
        """Encoder attention, a share for each layer, and positions that mean something."""
        layers = self.fitted(traits).layers or ()
        if len(layers) != len(self.ratios):
            return f"ratios={self.ratios}: must be one for each of layers={layers}"
        return (
            traits.refuse_positions(self.positions)
            or refuse_place(self.place, traits)
            or traits.refuse_layers("layers", layers, attention=layers)
        )

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before or behind the projector, and the inputs of the layers that begin a stage."""
        first = Site("pre_projector" if on_features(self.place, traits) else "projected")
        return (first, *(Site("decoder", layer) for layer in self.fitted(traits).layers or ()))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """What VisionZip reads, and queries and keys of these layers."""
        layers = self.fitted(traits).layers or ()
        return (*reads_of(traits, on_features(self.place, traits)), *(Function("query_key", layer) for layer in layers))

    def workspace(self, shape: Shape) -> int:
        """VisionZip's or, later, queries and keys of a layer with the question's attention."""
        asking = shape.attention(min(CHUNK, shape.rows - shape.visual))
        layer = 4 * (shape.queries + shape.keys) + asking + 3 * shape.samples * (shape.rows - shape.visual) * shape.rows
        return shape.edits + max(layer, zip_bytes(shape, self.split(shape.image_rows)[1]))

    def split(self, count: int) -> tuple[int, int]:
        """Dominant and contextual tokens of a grid of ``count``."""
        dominant = Budget(self.dominant, "floor").of(count)
        contextual = self.contextual if isinstance(self.contextual, int) else int(self.contextual * count)
        return (dominant, contextual) if dominant + contextual < count else (count, 0)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Zip each grid on its own, then rank the visual rows of each sample jointly."""
        return self._drop(site, x, layout, seen) if site.kind == "decoder" else self._zip(x, layout, seen)

    def _zip(self, x: Tensor, layout: Layout, seen: Seen) -> Edit | None:
        wanted = [self.split(items[0].count) for items in layout.items]
        splits = [split if sum(split) < n else (n, 0) for split, n in zip(wanted, layout.visual)]
        if tuple(map(sum, splits)) == layout.visual:
            return None
        read: Seen = {signal: value for signal, value in seen.items() if isinstance(signal, Rows | Columns | Keys | Summary)}
        return edit_of(splits, x, layout, read, self.pool)

    def _drop(self, site: Site, x: Tensor, layout: Layout, seen: Seen) -> Edit | None:
        ratio = self.ratios[(self.layers or ()).index(site.layer)]
        entered = [sum(sum(self.split(item.count)) for item in items) for items in layout.items]
        counts = tuple(min(int(ratio * count), alive) for count, alive in zip(entered, layout.visual))
        if counts == layout.visual:
            return None
        query, key = seen[Function("query_key", site.layer)](x, layout)
        scores = asked_for(query, key, layout.question_rows, layout.prompt)
        return layout.keeping(top_rows(scores, layout.rows(*VISUAL), counts), counts, self.positions)
