"""Prune2Drive: farthest-point sampling of each camera's tokens, with a rate for each camera.

Paper: "Prune2Drive: A Plug-and-Play Framework for Accelerating Vision-Language Models in Autonomous Driving", arXiv
2508.13305. By default as the published code: on the hidden states that enter decoder layer 1, beginning with the most remote
token (the paper says: right behind the encoder, which is ``layer=0``, with a random one); original positions. The rates that
the paper's search found are not published: ``rates`` takes those of your own search, in the order of the prompt's pictures.
``foveate tune`` searches them for tasks with several pictures, as the paper does by TPE and from the same range, but for its
own goal (the paper's is the score minus 0.03 times the sum of the rates). A view is a grid of tokens; reconstructed: where a
family cuts pictures into tiles, the tiles count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget, Rounding
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.positions import Positions
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import ByPicture, Tunable
from foveate.ops.farthest import farthest_first


@register
@dataclass(frozen=True)
class Prune2Drive(Tokens):
    """Tokens of each view that are far from each other by cosine."""

    name = "prune2drive"
    title = "Prune2Drive"
    group = "in_llm"
    paper = "arXiv 2508.13305"
    helps = "Several views of one scene, of which some matter more: each has a share of its own."
    needs = ("hidden states (1 layer)",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.095
    """Tokens that are left of each view that ``rates`` says nothing of."""
    rates: tuple[Annotated[float, In(0, 1)], ...] = ()
    """Share of each view that stays, at least one token; views beyond these have ``keep``."""
    layer: Annotated[int, AtLeast(0)] = 1
    """Decoder layer before which tokens are dropped, counted from 0; 0 = before the language model."""
    rounding: Rounding = "floor"
    """How a share becomes a count."""
    positions: Positions = "anchor"
    """Rotary positions of what stays: their own, or as `foveate.core.layout.Edit` says."""

    def check(self, traits: Traits) -> str | None:
        """The layer must exist; contiguous positions have no meaning under M-RoPE."""
        return traits.refuse_layers("layer", self.layer, least=0) or traits.refuse_positions(self.positions)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of layer ``layer``."""
        return (Site("decoder", self.layer) if self.layer else Site("sequence"),)

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, as given and once more, and their distances."""
        return shape.edits + 3 * shape.floats(shape.hidden) + 3 * shape.pairs

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """A rate for each view, from the paper's range; its six cameras are the most."""
        return {"rates": ByPicture(0.1, 1.0, most=6)}

    def budget(self, view: int, count: int) -> int:
        """Tokens to keep of the ``count`` of a view."""
        if view >= len(self.rates):
            return Budget(self.keep, self.rounding).of(count)
        return Budget(self.rates[view], self.rounding).of(count) if self.rates[view] else min(1, count)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Sample views with as many tokens side by side, each on its own."""
        alive = layout.alive
        kept_of = {
            (b, j): min(self.budget(j, item.count), alive[b][j])
            for b, items in enumerate(layout.items)
            for j, item in enumerate(items)
            if alive[b][j]
        }
        if all(count == alive[b][j] for (b, j), count in kept_of.items()):
            return None
        groups: dict[int, list[tuple[int, int]]] = {}
        for b, j in kept_of:
            groups.setdefault(alive[b][j], []).append((b, j))
        kept = torch.zeros_like(layout.valid)
        for views in groups.values():
            sample, counts = upload([b for b, _ in views], x.device), [kept_of[view] for view in views]
            where = layout.where(views)
            with about(sample, where, layout.shape):
                order = farthest_first(x[sample[:, None], where], max(counts))
            first = torch.arange(order.shape[1], device=x.device) < upload(counts, x.device)[:, None]
            kept[sample[:, None], where.gather(1, order)] = first
        by_item = tuple(tuple(kept_of.get((b, j), 0) for j in range(len(items))) for b, items in enumerate(layout.items))
        return layout.keeping(kept, tuple(map(sum, by_item)), self.positions, by_item=by_item)
