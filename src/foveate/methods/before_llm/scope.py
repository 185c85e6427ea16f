"""SCOPE: greedily keep the tokens that are salient to CLS and cover what is not yet covered.

Paper: "SCOPE: Saliency-Coverage Oriented Token Pruning for Efficient Multimodal LLMs", arXiv 2510.24214.
Reconstructed: on encoders without CLS the saliency is the mean attention received (``saliency="received"``); the paper
reports such encoders but does not say what it used.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import AtLeast
from foveate.core.positions import Positions
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Columns, Features, Rows, Signal, Site
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK


@torch.no_grad()
def greedy_cover(
    features: Tensor, saliency: Tensor, k: int, alpha: float = 1.0, combine: Literal["multiply", "add"] = "multiply"
) -> Tensor:
    """Saliency-weighted facility location.

    Each step takes the token with the largest ``gain * saliency ** alpha`` (or ``gain + saliency ** alpha``), where the
    gain is the rise of ``sum_u max_{s in S} cos(u, s)`` over all tokens u.

    Args:
        features: ``[I, N, D]``.
        saliency: ``[I, N]``.
        k: budget.
        alpha: exponent of the saliency.
        combine: how gain and saliency meet.

    Returns:
        ``[I, k]`` indices in the order of selection.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1, eps=1e-8)
    similarity = unit @ unit.transpose(1, 2)
    weight = ranked(saliency.float()) ** alpha
    covered = torch.zeros_like(weight)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    rise = torch.empty_like(similarity)
    order = []
    for _ in range(k):
        # similarity is symmetric: row v holds cos(v, u) for all u, so summing rows reads memory in order
        gain = torch.sub(similarity, covered[:, None], out=rise).clamp_(min=0).sum(2)
        score = gain * weight if combine == "multiply" else gain + weight
        best = score.masked_fill_(taken, float("-inf")).argmax(1)
        order.append(best)
        taken.scatter_(1, best[:, None], True)
        row = similarity.gather(1, best[:, None, None].expand(-1, 1, similarity.shape[2]))[:, 0]
        covered = torch.maximum(covered, row)
    return torch.stack(order, dim=1)


@register
@dataclass(frozen=True)
class Scope(ItemTokens):
    """Saliency times coverage, greedily, on the features that the projector is fed."""

    name = "scope"
    title = "SCOPE"
    group = "before_llm"
    paper = "arXiv 2510.24214"
    needs = ("CLS token (or saliency='received')", "encoder attention", "encoder features")

    keep: int | float = 64
    alpha: Annotated[float, AtLeast(0)] = 1.0
    combine: Literal["multiply", "add"] = "multiply"
    saliency: Literal["cls", "received"] = "cls"
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
        """Similarities of all tokens, twice, and attention of the encoder."""
        read = shape.image_attention(1 if self.saliency == "cls" else CHUNK)
        return super().workspace(shape) + 3 * shape.pairs + 3 * shape.floats(shape.features) + read

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Cover, then restore raster order."""
        features, attention = images.seen.values()
        saliency = attention.probabilities().sum(1)[:, 0] if self.saliency == "cls" else attention
        return greedy_cover(features, saliency, k, self.alpha, self.combine).sort(dim=1).values
