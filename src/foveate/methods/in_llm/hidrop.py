"""HiDrop: visual tokens skip the shallow layers, are cut hard in a concave pyramid, and leave at a deep layer.

Paper: "HiDrop: Hierarchical Vision Token Reduction in MLLMs via Late Injection, Concave Pyramid Pruning, and Early Exit",
arXiv 2602.23699. Its checkpoints were trained with this schedule. On any other checkpoint it is EXPERIMENTAL: late injection
puts raw projector outputs in front of layers that never saw such. Layers are counted from 1, as in the paper's
configuration. The top-k is plain: the released operator gives the same set, and more than k where scores are tied.
Reconstructed: other depths and grids get the same shares of the depth and of the tokens (stages that fall on one layer
become one, the last), and all images of a prompt are ranked jointly.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

import torch
from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.method import Plan, Routing, Tokens
from foveate.core.parameters import AtLeast, CountOrShare, Layers
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import from_rows
from foveate.ops.select import top_rows

DEPTH, TOKENS, LATE_ENTRY, EARLY_EXIT = 32, 576, 9, 25
PRESETS = {
    "tok48": ((10, 14, 16, 18), (87, 10, 5, 1)),
    "tok64": ((10, 14, 16, 18), (215, 10, 5, 1)),
    "tok80": ((10, 13, 16, 19), (453, 10, 5, 1)),
}
"""Filtering layers and kept tokens, by the mean count over the layers of LLaVA-1.5-7B."""


def count(keep: int | float, tokens: int) -> int:
    """Tokens to keep out of ``tokens`` originals: a count, or a share of which at least one stays unless it is 0."""
    if isinstance(keep, int):
        return keep
    return max(1, round(keep * tokens)) if keep else 0


@register
@dataclass(frozen=True)
class HiDrop(Tokens, Routing):
    """Late injection, pyramid and early exit; what is not given comes from the ``preset``."""

    name = "hidrop"
    title = "HiDrop"
    group = "in_llm"
    paper = "arXiv 2602.23699"
    helps = "Models that were trained with this schedule."
    trained = (
        "the models of its paper were trained with this schedule; others never saw raw projector outputs in the "
        "middle of their layers"
    )
    needs = ("decoder queries and keys (1 layer for each stage)",)
    identity_at = {"late_entry": 1, "layer_list": (), "keep_list": (), "early_exit": 0}  # noqa: RUF012

    preset: Literal["tok48", "tok64", "tok80"] = "tok64"
    """Schedule of what is not given: about so many tokens in the mean over the layers of LLaVA-1.5-7B."""
    late_entry: Annotated[int, AtLeast(1)] | None = None
    """First layer that visual tokens run through, counted from 1; None = 9 of 32."""
    layer_list: Annotated[tuple[int, ...], Layers()] | None = None
    """Layers, counted from 1, after which tokens are dropped, by the attention of the next one; None = the preset's."""
    keep_list: tuple[Annotated[int | float, CountOrShare("tokens")], ...] | None = None
    """What stays of each prompt after each of them: a count, or a share of the original tokens; None = the preset's."""
    early_exit: Annotated[int, AtLeast(0)] | None = None
    """First layer without visual tokens, counted from 1; 0 = none; None = 25 of 32."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given, kept = self.layer_list, self.keep_list
        together = (given is None) == (kept is None) and len(given or ()) == len(kept or ())
        self.require(together, "keep_list", f"must be one for each of layer_list={given}")

    def fitted(self, traits: Traits) -> Self:
        """The preset at the same shares of the depth and of the tokens."""

        def depth(layer: int) -> int:
            return round(layer * traits.decoder_layers / DEPTH)

        entry = self.late_entry if self.late_entry is not None else depth(LATE_ENTRY - 1) + 1
        leave = self.early_exit if self.early_exit is not None else depth(EARLY_EXIT - 1) + 1
        if self.layer_list is not None:
            return replace(self, late_entry=entry, early_exit=leave)
        layers, counts = PRESETS[self.preset]
        stages = {max(entry, depth(layer)): kept / TOKENS for layer, kept in zip(layers, counts)}
        stages = {layer: kept for layer, kept in stages.items() if leave == 0 or layer < leave - 1}
        return replace(self, late_entry=entry, layer_list=tuple(stages), keep_list=tuple(stages.values()), early_exit=leave)

    def check(self, traits: Traits) -> str | None:
        """Entry, stages and exit must come in this order, within the model."""
        fit, depth = self.fitted(traits), traits.decoder_layers
        entry, leave, layers = fit.late_entry or 1, fit.early_exit or 0, fit.layer_list or ()
        if entry > depth:
            return f"late_entry={entry}: must be in 1..{depth}"
        if leave and not entry <= leave <= depth + 1:
            return f"early_exit={leave}: must be in {entry}..{depth + 1} (from late_entry on), or 0"
        if any(not entry <= layer < (leave or depth + 1) - 1 for layer in layers):
            return f"layer_list={layers}: must be in {entry}..{(leave or depth + 1) - 2} (between late_entry and early_exit)"
        return traits.refuse_layers("layer_list", layers, attention=layers)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Behind the filtering layers, and before the exit."""
        fit = self.fitted(traits)
        leave = (fit.early_exit or 0) - 1
        exits = (leave,) if 0 <= leave < traits.decoder_layers else ()
        return tuple(Site("decoder", layer) for layer in (*(fit.layer_list or ()), *exits))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Queries and keys of the layer behind each filtering layer."""
        return tuple(Function("query_key", layer) for layer in self.fitted(traits).layer_list or ())

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Where tokens enter and leave."""
        return {"late_entry": Range(1, traits.decoder_layers), "early_exit": Range(1, traits.decoder_layers)}

    def workspace(self, shape: Shape) -> int:
        """Rows that are not there yet; queries and keys of a layer."""
        return shape.edits + shape.routing + shape.hidden + 4 * (shape.queries + shape.keys) + shape.attention(1)

    def routed(self, traits: Traits) -> tuple[int, ...]:
        """The layers before the entry."""
        return tuple(range((self.fitted(traits).late_entry or 1) - 1))

    def plan(self, layer: int, x: Tensor, layout: Layout, seen: Seen, state: State) -> Plan | None:
        """Visual rows are not there yet: no queries, no keys."""
        return Plan.of_text(layout)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the visual rows of each sample jointly; at the exit they all go."""
        layers = self.layer_list or ()
        keep = (self.keep_list or ())[layers.index(site.layer)] if site.layer in layers else 0
        counts = tuple(min(count(keep, total), alive) for total, alive in zip(layout.originals, layout.visual))
        if counts == layout.visual:
            return None
        if not any(counts):
            return layout.keeping(torch.zeros_like(layout.valid), counts)
        query, key = seen[Function("query_key", site.layer)](x, layout)
        scores = from_rows(query, key, layout.last, layout.prompt[:, None])
        return layout.keeping(top_rows(scores, layout.rows(*VISUAL), counts), counts)
