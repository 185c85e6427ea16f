"""V2Drop: drop, in a few layers, the visual tokens that the layer before moved least.

Paper: "Variation-Aware Vision Token Dropping for Faster Large Vision-Language Models", arXiv 2509.01552. A token's variation
is the L2 norm of what one layer, attention and MLP, wrote to its residual stream; no attention is looked at. The default is
the released LLaVA-1.5 schedule; that of Qwen2-VL-7B is ``layers=(3, 16, 22), ratios=(0.25, 0.05, 0.0)`` of 28 layers.
Reconstructed: the same shares of other depths, and each image of a prompt on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Self

from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import Layers, Shares
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Hidden, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.select import top_of_groups


def variation(before: Tensor, after: Tensor) -> Tensor:
    """How far each row moved from ``before`` to ``after`` ``[B, N, D]``: L2 norm ``[B, N]``, float32."""
    # In bf16 the difference would tie and reorder.
    return (after.float() - before.float()).square().sum(-1).sqrt()


def survivors(alive: int, ratio: float) -> int:
    """Tokens of one image that stay out of ``alive``: never none where there was one."""
    return min(alive, max(1, int(alive * ratio)))


@register
@dataclass(frozen=True)
class V2Drop(Tokens):
    """Before each of ``layers`` keep the share of ``ratios`` of the visual tokens still there, the liveliest."""

    name = "v2drop"
    title = "V2Drop"
    group = "in_llm"
    paper = "arXiv 2509.01552"
    helps = "Where attention is not to be looked at: only hidden states are read."
    needs = ("decoder hidden states (1 layer for each stage)",)
    identity_at = {"layers": None, "ratios": (1.0, 1.0, 1.0)}  # noqa: RUF012

    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Decoder layers, counted from 0, before which tokens are dropped; None = 3, 17 and 22 of 32."""
    ratios: Annotated[tuple[float, ...], Shares()] = (0.5, 0.5, 0.0)
    """Share that stays before each of them, of the current count in each grid (a picture, or one tile or view of it); at
    least one token stays.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = 3 if self.layers is None else len(self.layers)
        self.require(len(self.ratios) == stages, "ratios", f"must be one for each of the {stages} stages; see layers")

    def fitted(self, traits: Traits) -> Self:
        """Stages at the published shares of the depth."""
        return self if self.layers is not None else replace(self, layers=traits.same_depth((3, 17, 22), of=32))

    def check(self, traits: Traits) -> str | None:
        """Every stage needs a layer before it."""
        return traits.refuse_layers("layers", self.fitted(traits).layers or ())

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The inputs of the stages' layers."""
        return tuple(Site("decoder", layer) for layer in self.fitted(traits).layers or ())

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """What entered the layer before each stage."""
        return tuple(Hidden(Site("decoder", site.layer - 1)) for site in self.sites(traits))

    def workspace(self, shape: Shape) -> int:
        """Input and output of a layer, and their difference."""
        return shape.edits + shape.hidden + 4 * shape.floats(shape.hidden)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the tokens of each image."""
        ratio = self.ratios[(self.layers or ()).index(site.layer)]
        alive = layout.alive
        kept = [[survivors(count, ratio) for count in counts] for counts in alive]
        if kept == alive:
            return None
        moved = variation(seen[Hidden(Site("decoder", site.layer - 1))], x)
        group = layout.item.masked_fill(~layout.rows(*VISUAL), -1)
        chosen = top_of_groups(moved, group, kept)
        return layout.keeping(chosen, tuple(map(sum, kept)), by_item=tuple(map(tuple, kept)))
