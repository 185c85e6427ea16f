"""FEATHER: FastV repaired: scores without rotary positions, an even grid beside the best, and a second, harder cut deeper.

Paper: "Feather the Throttle: Revisiting Visual Token Pruning for Vision-Language Model Acceleration", arXiv 2412.13180.
Rotary positions make FastV keep the bottom of the picture, so queries and keys are compared unrotated. As released, the
second cut keeps ``kappa ** 2`` of the *survivors* (``keep2`` sets another share), down to none. Reconstructed: the grid of
each image comes from its true rows and columns (a video counts as one tall grid), attention ranks all images of a prompt
jointly, and other depths cut at the same shares of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Layers
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Hidden, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import from_rows
from foveate.ops.select import top_rows


def image_scores(query: Tensor, key: Tensor, last: Tensor, visual: Tensor) -> Tensor:
    """Head mean of a softmax over visual keys only: ``[B, N]``, summing to 1, 0 elsewhere.

    Args:
        query, key: ``[B, H or Hkv, N, d]``, not rotated.
        last: ``[B, 1]`` the row that asks.
        visual: ``[B, N]`` bool.
    """
    return from_rows(query, key, last, visual[:, None])


def strided(yx: Tensor, stride: int) -> Tensor:
    """Mask ``[B, N]`` of the cells ``yx`` ``[B, N, 2]`` (-1 = none) whose row and column are multiples of ``stride``."""
    return ((yx >= 0) & (yx % stride == 0)).all(-1)


@register
@dataclass(frozen=True)
class Feather(Tokens):
    """Keep the best and a strided grid before the first of ``layers``, the best of what is left before the second."""

    name = "feather"
    title = "FEATHER"
    group = "in_llm"
    paper = "arXiv 2412.13180"
    helps = "Where FastV keeps the bottom of a picture whatever is asked, as the paper found: finding things and places."
    needs = ("decoder queries and keys, not rotated (2 layers)",)
    identity_at = {"kappa": 1.0, "keep2": None}  # noqa: RUF012

    kappa: Annotated[float, In(0, 1)] = 0.3
    """Share that attention chooses in the first cut; the grid comes on top, so how many stay differs by sample."""
    stride: Annotated[int, AtLeast(1)] = 3
    """Every so many rows and columns a token stays in the first cut; 1 keeps all."""
    layers: Annotated[tuple[int, ...], Layers(stages=2)] | None = None
    """The cuts are made before these, by the queries and keys of the layers before them; None = 8 and 16 of 32."""
    keep2: Annotated[float, In(0, 1)] | None = None
    """Share of the survivors that the second cut keeps; None = ``kappa ** 2``."""

    def fitted(self, traits: Traits) -> Self:
        """Cuts at the paper's shares of the depth."""
        first, second = self.layers or traits.same_depth((8, 16), of=32)
        return replace(self, layers=(first, second))

    def check(self, traits: Traits) -> str | None:
        """Both cuts need a layer before them."""
        layers = self.fitted(traits).layers or ()
        return traits.refuse_layers("layers", layers, attention=[layer - 1 for layer in layers])

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The inputs of both layers."""
        return tuple(Site("decoder", layer) for layer in self.fitted(traits).layers or ())

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Input, and queries and keys, of the layer before each cut."""
        before = [site.layer - 1 for site in self.sites(traits)]
        return tuple(s for layer in before for s in (Hidden(Site("decoder", layer)), Function("query_key", layer)))

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """The share of both cuts."""
        return {"kappa": Range(0.05, 1.0, log=True)}

    def workspace(self, shape: Shape) -> int:
        """Input, queries and keys of a layer."""
        return shape.edits + 3 * shape.hidden + 2 * (shape.queries + shape.keys) + shape.attention(1)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """The first cut's count depends on how far attention and grid overlap: it is read from the device once."""
        first = self.layers is not None and site.layer == self.layers[0]
        share = self.kappa if first else self.kappa * self.kappa if self.keep2 is None else self.keep2
        counts = tuple(int(count * share) for count in layout.visual)
        if counts == layout.visual:
            return None
        before = seen[Hidden(Site("decoder", site.layer - 1))]
        query, key = seen[Function("query_key", site.layer - 1)](before, layout, rope=False)
        visual = layout.rows(*VISUAL)
        chosen = top_rows(image_scores(query, key, layout.last, visual), visual, counts)
        if first:
            chosen |= strided(layout.yx, self.stride) & visual
            counts = tuple(chosen.sum(1).tolist())
        return None if counts == layout.visual else layout.keeping(chosen, counts)
