"""SCOPE: greedily keep the tokens that are salient to CLS and cover what is not yet covered.

Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", arXiv 2510.24214.
Reconstructed: on encoders without CLS the saliency is the mean attention received (``saliency="received"``); the paper
reports such encoders but does not say what it used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import AtLeast
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Columns, Features, Rows, Signal, Site
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.cover import Combine, greedy_cover


@register
@dataclass(frozen=True)
class Scope(ItemTokens):
    """Saliency times coverage, greedily, on the features that the projector is fed."""

    name = "scope"
    title = "SCOPE"
    group = "before_llm"
    paper = "arXiv 2510.24214"
    helps = "Any question: no question is read, and what is kept covers what the picture holds beside what stands out."
    needs = ("CLS token (or saliency='received')", "encoder attention", "encoder features")

    keep: int | float = 64
    alpha: Annotated[float, AtLeast(0)] = 1.0
    """Exponent of the saliency: 0 = coverage alone, more = saliency counts for more."""
    combine: Combine = "multiply"
    """Whether what a token would cover and its saliency are multiplied or added."""
    saliency: Literal["cls", "received"] = "cls"
    """Attention of CLS, or the mean attention that a token received (``"received"``), for encoders without CLS."""
    positions: Positions = "auto"

    def check(self, traits: Traits) -> str | None:
        """Needs encoder signals, and CLS unless told otherwise."""
        if traits.encoder_layers is None:
            return f"needs encoder signals, which are not available on {traits.family}; use fastv, uniform or random"
        if self.saliency == "cls" and not traits.has_cls:
            return "needs a CLS token, which this model's encoder has not; use scope(saliency='received')"
        return super().check(traits)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Features, and attention of the layer that they come from."""
        site = Site("encoder", traits.feature_layer or 0)
        return Features(), Rows(site, "cls") if self.saliency == "cls" else Columns(site)

    def workspace(self, shape: Shape) -> int:
        """Similarities of all tokens, what they would add, and attention of the encoder."""
        read = shape.image_attention(1 if self.saliency == "cls" else CHUNK)
        return super().workspace(shape) + 2 * shape.pairs + 3 * shape.floats(shape.features) + read

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Cover, then restore raster order."""
        features, attention = images.seen.values()
        saliency = attention.probabilities().sum(1)[:, 0] if self.saliency == "cls" else attention
        return greedy_cover(features, saliency, k, self.alpha, self.combine).sort(dim=1).values
