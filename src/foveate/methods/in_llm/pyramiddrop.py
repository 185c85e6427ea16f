"""PyramidDrop: visual tokens are halved after each quarter of the language model, by the last prompt token's attention.

Paper: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual Redundancy Reduction", arXiv
2410.17247. As the published code, the attention at a stage's end is that of the *next* layer's norm and projections on its
input (the paper speaks of the last layer of the stage), and a stage keeps a share of the *original* count, truncated (the
paper rounds the share of the current one). Positions are renumbered at every stage, but under M-RoPE original ones stay:
renumbering three axes has no meaning. Reconstructed: other depths get their stages at the same shares of it (the paper's 8,
16 and 24 of 32), and all pictures of a prompt are ranked jointly, as the tiles of one are in the code.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Self

from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import Layers, Shares
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import from_rows
from foveate.ops.select import top_rows


@register
@dataclass(frozen=True)
class PyramidDrop(Tokens):
    """Keep the best ``ratios`` of the original visual tokens before each of ``layers``."""

    name = "pyramiddrop"
    title = "PyramidDrop"
    group = "in_llm"
    paper = "arXiv 2410.17247"
    helps = "Long prompts whose question needs detail: shallow layers see everything, deep ones little."
    needs = ("decoder queries and keys (1 layer for each stage)",)
    identity_at = {"layers": None, "ratios": (1.0, 1.0, 1.0)}  # noqa: RUF012

    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Layers before which tokens are dropped, counted from 0; None = 8, 16 and 24 of 32."""
    ratios: Annotated[tuple[float, ...], Shares()] = (0.5, 0.25, 0.125)
    """Share of the original tokens that stays from each of them on."""
    positions: Positions = "auto"
    """Rotary positions of what stays: renumbered at every stage where they are one row (``"contiguous"``),
    else their own."""

    def fitted(self, traits: Traits) -> Self:
        """Stages at the paper's shares of the depth."""
        return replace(self, layers=self.layers or traits.same_depth((8, 16, 24), of=32))

    def check(self, traits: Traits) -> str | None:
        """A share for each layer; contiguous positions have no meaning under M-RoPE."""
        layers = self.fitted(traits).layers or ()
        if len(layers) != len(self.ratios):
            return f"ratios={self.ratios}: must be one for each of layers={layers}"
        return traits.refuse_positions(self.positions) or traits.refuse_layers("layers", layers, attention=layers)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The inputs of the layers that begin a stage."""
        return tuple(Site("decoder", layer) for layer in self.fitted(traits).layers or ())

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Queries and keys of these layers."""
        return tuple(Function("query_key", layer) for layer in self.fitted(traits).layers or ())

    def workspace(self, shape: Shape) -> int:
        """Queries and keys of a layer."""
        return shape.edits + 4 * (shape.queries + shape.keys) + shape.attention(1)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the visual rows of each sample jointly."""
        ratio = self.ratios[(self.layers or ()).index(site.layer)]
        wanted = [Budget(ratio, "floor").of(total) if ratio else 0 for total in layout.originals]
        counts = tuple(map(min, wanted, layout.visual))
        if counts == layout.visual:
            return None
        query, key = seen[Function("query_key", site.layer)](x, layout)
        scores = from_rows(query, key, layout.last, layout.prompt[:, None])
        return layout.keeping(top_rows(scores, layout.rows(*VISUAL), counts), counts, self.positions)
