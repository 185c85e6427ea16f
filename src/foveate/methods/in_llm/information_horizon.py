"""Information Horizon: a real criterion while tokens still say something, and a random choice behind.

Paper: "When Token Pruning is Worse than Random: Understanding Visual Token Information in VLLMs", arXiv 2512.07580. The
first stage is DivPrune's choice; its other one is a recipe of two, ``dart+information_horizon(first=1.0)``. Where the
horizon lies depends on model and question (deeper for reading): ``foveate probe information-horizon`` measures it. Differs
from the released code, whose draws no seed repeats; under M-RoPE original positions stay. Reconstructed: other depths and
counts get the same shares; all pictures of a prompt are one pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, CountOrShare, Keep
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.draw import draw
from foveate.ops.farthest import spread_out
from foveate.ops.select import first_rows


@register
@dataclass(frozen=True)
class InformationHorizon(Tokens):
    """Spread-out tokens before layer ``first_layer``, a random part of them from ``horizon`` on."""

    name = "information_horizon"
    title = "Information Horizon"
    group = "in_llm"
    paper = "arXiv 2512.07580"
    helps = "As the control for every choice in deep layers: one that is no better than this one is worth nothing there."
    needs = ("projected tokens",)
    identity_at = {"first": 1.0, "beyond": 1.0}  # noqa: RUF012

    first: Annotated[int | float, Keep()] = 0.493
    """Visual tokens of a sample, all of its pictures together, that the first stage leaves: a count or a share."""
    beyond: Annotated[int | float, CountOrShare("tokens")] = 0.066
    """Visual tokens that are left behind the horizon: a count, or a share of the original ones; 0 = all leave."""
    first_layer: Annotated[int, AtLeast(0)] = 0
    """Decoder layer before which the first stage acts, counted from 0; 0 = before the language model."""
    horizon: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer before which the random choice is made; None = 20 of 32."""
    positions: Positions = "auto"
    """Rotary positions of what stays: renumbered at both stages where they are one row (``"contiguous"``), else their
    own."""

    def fitted(self, traits: Traits) -> Self:
        """The horizon at the published share of the depth."""
        return self if self.horizon is not None else replace(self, horizon=traits.same_depth((20,), of=32)[0])

    def check(self, traits: Traits) -> str | None:
        """The horizon must exist and lie behind the first stage; contiguous positions have no meaning under M-RoPE."""
        horizon = self.fitted(traits).horizon or 1
        if horizon <= self.first_layer:
            return f"horizon={horizon}: must be behind first_layer={self.first_layer}"
        return traits.refuse_positions(self.positions) or traits.refuse_layers("horizon", horizon)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The first stage's input, and the horizon's."""
        first = Site("decoder", self.first_layer) if self.first_layer else Site("sequence")
        return first, Site("decoder", self.fitted(traits).horizon or 1)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Both budgets and the horizon."""
        depth = traits.decoder_layers
        shares = {"first": Range(0.05, 1.0, log=True), "beyond": Range(0.0, 1.0)}
        return {**shares, "first_layer": (self.first_layer,), "horizon": Range(self.first_layer + 1, depth - 1)}

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, as given and once more, and their distances."""
        return shape.edits + 3 * shape.floats(shape.hidden) + 3 * shape.pairs

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt."""
        random = site.layer == self.horizon
        budget = self.beyond if random else self.first
        wanted = [Budget(budget).of(total) if budget else 0 for total in layout.originals]
        counts = tuple(map(min, wanted, layout.visual))
        if counts == layout.visual:
            return None
        rows = last_of(layout.rows(*VISUAL), max(layout.visual))
        chosen = (
            first_rows(self._drawn(layout, counts, state, x.device), rows.clamp(min=0), counts, layout.shape[1])
            if random
            else spread_out(x, rows, counts)
        )
        return layout.keeping(chosen, counts, self.positions)

    def _drawn(self, layout: Layout, counts: tuple[int, ...], state: State, device: torch.device) -> Tensor:
        """``[B, k]`` places of ``counts[b]`` visual rows among the longest sample's, to whose end all are aligned."""
        drawn = torch.zeros(len(counts), max(counts), dtype=torch.long)
        for sample, (alive, k) in enumerate(zip(layout.visual, counts)):
            first = max(layout.visual) - alive
            drawn[sample, :k] = first + draw(alive, k, state.get("session", "seed", 0), number=0)
        return upload(drawn, device)
