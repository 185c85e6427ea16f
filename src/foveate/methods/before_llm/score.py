"""SCoRe: farthest-first traversal of the features, each distance weighed by the token's salience.

Paper: "SCoRe: Salience-Coverage Reduction for Vision Token Pruning in Vision-Language Models", CVPR 2026, no arXiv id.
Reconstructed from public notes that quote its formulas; no code is public. Our reading: features and salience come from the
block that feeds the projector (the notes say "last layer"); raster order; every grid on its own; mean attention received
where an encoder has no CLS (``salience="received"``). The greedy is exactly that of the stated objective at ``alpha=1``.
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
from foveate.ops.farthest import farthest_first


def salient_cover(features: Tensor, salience: Tensor, k: int, alpha: float = 0.8) -> Tensor:
    """Begins with the most salient token, then takes ``argmax_i d_i * salience_i ** alpha``, d the distance to the chosen.

    Args:
        features: ``[I, N, D]``, compared by cosine.
        salience: ``[I, N]``, not negative.
        k: budget.
        alpha: 0 for pure distance; the larger, the nearer to the k most salient.

    Returns:
        ``[I, k]`` indices in the order of choice.
    """
    # At length 1 no power of it underflows before the others do.
    relative = salience.float() / salience.float().amax(1, keepdim=True).clamp(min=1e-30)
    return farthest_first(features, k, first=relative.argmax(1), weight=relative**alpha)


@register
@dataclass(frozen=True)
class SCoRe(ItemTokens):
    """Cosine distance to what is kept, times salience to a power, greedily, on the features that the projector is fed."""

    name = "score"
    title = "SCoRe"
    group = "before_llm"
    paper = "CVPR 2026"
    helps = "Any question: no question is read, and no part of the picture is left without a token that stands for it."
    needs = ("CLS token (or salience='received')", "encoder attention", "encoder features")

    keep: int | float = 64
    alpha: Annotated[float, AtLeast(0)] = 0.8
    """Exponent of the salience: 0 = distance alone, large = the most salient alone."""
    salience: Literal["cls", "received"] = "cls"
    """Attention of CLS, or the mean attention that a token received (``"received"``), for encoders without CLS."""
    positions: Positions = "auto"

    def check(self, traits: Traits) -> str | None:
        """Needs encoder signals, and CLS unless told otherwise."""
        if traits.encoder_layers is None:
            return f"needs encoder signals, which are not available on {traits.family}; use divprune, uniform or random"
        if self.salience == "cls" and not traits.has_cls:
            return "needs a CLS token, which this model's encoder has not; use score(salience='received')"
        return super().check(traits)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Features, and attention of the layer that they come from."""
        site = Site("encoder", traits.feature_layer or 0)
        return Features(), Rows(site, "cls") if self.salience == "cls" else Columns(site)

    def workspace(self, shape: Shape) -> int:
        """Features at length 1, their distances, and attention of the encoder."""
        read = shape.image_attention(1 if self.salience == "cls" else CHUNK)
        return super().workspace(shape) + 2 * shape.pairs + 3 * shape.floats(shape.features) + read

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Cover, then restore raster order."""
        features, attention = images.seen.values()
        salience = attention.probabilities().sum(1)[:, 0] if self.salience == "cls" else attention
        return salient_cover(features, salience, k, self.alpha).sort(dim=1).values
