"""PyramidKV: SnapKV with budgets that fall from layer to layer, as attention gathers on fewer entries with depth.

Paper: "PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling", arXiv 2406.02069. Follows
NVIDIA/kvpress: the budget is a share of the prompt, holds the window, and is the same in every layer where the smallest one
would be less than the window, as it is for prompts of usual length unless ``window`` or ``beta`` is small. The original
code's budgets are ``reading="original"``: the window comes on top, prompts of less than twice the budget get the same in
every layer, steps are whole numbers. Both are here of ``keep``, where the original has a fixed capacity.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from foveate.core.budget import Budget
from foveate.core.parameters import AtLeast, Keep
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.methods.kv_cache.snapkv import SnapKV


def falling(capacity: int, candidates: int, layer: int, layers: int, beta: int) -> int:
    """Entries that a layer keeps out of ``candidates``, by the original code: whole steps down from layer to layer.

    ``capacity`` is the mean; the last layer has about 1/``beta`` of it.
    """
    least = capacity // beta
    most = 2 * capacity - least
    if most >= candidates:
        most, least = candidates, 2 * capacity - candidates
    return most - layer * ((most - least) // max(layers - 1, 1))


def pyramid(kept: float, entries: int, window: int, layer: int, layers: int, beta: int) -> int:
    """Entries that a layer keeps out of ``entries``, the ``window`` among them, by kvpress: straight down, then rounded.

    ``kept`` is the mean. The same everywhere where the last layer would keep less than the window.
    """
    least = kept / beta
    most = 2 * kept - least
    if most >= entries - window:
        most, least = entries - window, 2 * kept - (entries - window)
    if not entries >= most >= least >= window:
        return round(kept)
    return round(most - layer * ((most - least) / max(layers - 1, 1)))


@register
@dataclass(frozen=True)
class PyramidKV(SnapKV):
    """Keep a share of all layers' cached entries, more of the first layers than of the last."""

    name = "pyramidkv"
    title = "PyramidKV"
    paper = "arXiv 2406.02069"
    helps = "As SnapKV, where early layers look at everything and late ones at little; a common baseline."

    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the entries that may go, or how many of them, that stays for each key-value head; the mean over layers,
    rounded.
    """
    beta: Annotated[int, AtLeast(1)] = 20
    """How steeply budgets fall: the last layer has about 1/beta of the mean."""
    reading: Literal["kvpress", "original"] = "kvpress"
    """Whose budgets: with the window inside, or beside the window, by whole steps (``"original"``)."""

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """The slope, too."""
        return {**super().tunable(traits), "beta": (2, 5, 10, 20)}

    def workspace(self, shape: Shape) -> int:
        """As `SnapKV`'s, with the scores of all layers."""
        return super().workspace(shape) + 2 * shape.layers * shape.entries

    @property
    def layer_by_layer(self) -> bool:
        """Budgets go by depth."""
        return False

    def _count(self, entries: int, depth: int, layers: int) -> int:
        # Entries of text, the window's among them, are beside the budget where only pictures are cut.
        window = min(self.window, entries) if self.tokens == "all" else 0
        beta = self.beta if layers > 1 else 1  # a layer that is the only one to be cut has the mean
        if self.reading == "kvpress":
            wanted = min(self.keep, entries) if isinstance(self.keep, int) else self.keep * entries
            return min(max(pyramid(wanted, entries, window, depth, layers, beta), 1), entries)
        kept = Budget(self.keep, "floor").of(entries)
        capacity = kept - window
        if capacity <= 0 or entries < 2 * capacity:
            return kept
        return max(window + falling(capacity, entries - window, depth, layers, beta), 1)
