"""ShortV: in layers that contribute little, visual tokens are frozen: still read as keys and values, never updated.

Paper: "ShortV: Efficient Multimodal Large Language Models by Freezing Visual Tokens in Ineffective Layers", arXiv
2504.00502. Which layers: by the layer contribution of the released code, KL(modified || original) of the last prompt token's
distribution. Published layer lists are presets for the models they were made on; elsewhere calibrate
(`foveate calibrate shortv`) or give ``layers``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any

import torch
from torch import Tensor

from foveate.core.artifact import Fingerprint
from foveate.core.layout import Layout
from foveate.core.method import Offline, Plan, Routing
from foveate.core.model_call import ModelCall
from foveate.core.parameters import CountOrShare, Layers
from foveate.core.recipe import Recipe
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Seen
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.divergence import divergence

# Least contributing layer first, as published.
LLAVA_7B = (31, 29, 30, 28, 0, 26, 27, 25, 24, 22, 23, 21, 2, 3, 20, 18, 17, 12, 19)
LLAVA_13B = (39, 32, 28, 36, 27, 37, 29, 30, 1, 38, 25, 31, 2, 26, 23, 34, 0, 33, 35, 22, 24, 21, 20, 17)
PRESETS = {Fingerprint("llava", 32, 4096, 32064): LLAVA_7B, Fingerprint("llava", 40, 5120, 32064): LLAVA_13B}


@register
@dataclass(frozen=True)
class ShortV(Routing, Offline):
    """Freeze visual rows in the ``frozen`` least contributing layers (a count, or a share of all layers)."""

    name = "shortv"
    title = "ShortV"
    group = "in_llm"
    paper = "arXiv 2504.00502"
    helps = "Where no token may be lost: all stay in the cache, and layers that do little for them are spared."
    needs = ("layer order (calibrated, or preset)", "a mask-capable attention kernel")
    identity_at = {"layers": ()}  # noqa: RUF012

    frozen: Annotated[int | float, CountOrShare("layers")] = 0.6
    """How many of the least contributing layers, or which share of all layers."""
    layers: Annotated[tuple[int, ...], Layers(0, any_order=True)] | None = None
    """Exactly these layers, counted from 0, instead of the ``frozen`` first ones of the order."""

    def __post_init__(self) -> None:
        if isinstance(self.layers, int):
            object.__setattr__(self, "layers", (self.layers,))
        super().__post_init__()

    def check(self, traits: Traits) -> str | None:
        """Layers must exist and their order be known; the kernel must take a mask with holes."""
        if traits.mask_free:
            return "frozen rows need a mask, which FlashAttention does not take; load with attn_implementation='sdpa'"
        if self.layers is not None:
            bad = [layer for layer in self.layers if layer >= traits.decoder_layers]
            return f"layers={self.layers}: must be in 0..{traits.decoder_layers - 1}" if bad else None
        order = self._order(traits)
        if order is None:
            return self.refuse_numbers(traits, f"no layer order is known for {traits.fingerprint}", ", or give layers=(...)")
        if self._count(traits) > len(order):
            return f"frozen={self.frozen}: the order known for this model has {len(order)} layers"
        return None

    def routed(self, traits: Traits) -> tuple[int, ...]:
        """The frozen layers."""
        if self.layers is not None:
            return tuple(sorted(set(self.layers)))
        return tuple(sorted((self._order(traits) or ())[: self._count(traits)]))

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How many layers."""
        return {"frozen": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)}

    def workspace(self, shape: Shape) -> int:
        """The frozen rows' part."""
        return shape.routing

    def plan(self, layer: int, x: Tensor, layout: Layout, seen: Seen, state: State) -> Plan | None:
        """All visual rows are frozen; a text-only prompt runs plainly."""
        return Plan.of_text(layout, frozen=True)

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Freeze one layer at a time and see how far the last prompt token's distribution moves."""
        call.begin("freezing one layer at a time", (call.traits.decoder_layers + 1) * call.batches)
        original = call.logits(Recipe())
        contribution = torch.stack(
            [
                divergence(original, call.logits(Recipe((replace(self, layers=(layer,)),)))).mean()
                for layer in range(call.traits.decoder_layers)
            ]
        )
        order = contribution.sort(stable=True).indices
        return {"order": order.tolist(), "contribution": contribution.tolist()}

    def _count(self, traits: Traits) -> int:
        return self.frozen if isinstance(self.frozen, int) else round(self.frozen * traits.decoder_layers)

    def _order(self, traits: Traits) -> tuple[int, ...] | None:
        numbers = self.numbers(traits)
        return PRESETS.get(traits.fingerprint) if numbers is None else tuple(numbers["order"])
