"""ZOO-Prune: tokens that the projector reacts to most, and that lie far from each other.

Paper: "Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models", arXiv 2509.24837. What a
token's sensitivity is: how far the projector's output moves, on average, when its input is pushed both ways along random
directions; the same directions for all tokens, drawn from the session's seed. Each step takes the token with the largest
sensitivity (scaled to [0, 1]) times cosine distance to what was taken. Differs from the code: the projector runs in float32
(the code lets half precision cancel); sensitivities that are equal but for rounding count as equal, and then distance alone
decides. Reconstructed: for LLaVA-NeXT the code pushes a low-rank copy of the projector, which is not public: with ``rank``
(the paper's is 128, by public notes) each linear weight is a truncated singular value decomposition of its own, made at
attach, and the distances are still those of the real projector's tokens. Where a token is made of
several rows of the encoder (Qwen), one direction pushes all of them; every grid is on its own, the details of a LLaVA-NeXT
picture as one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import AtLeast
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.shape import FLOAT, Shape
from foveate.core.signal import Features, Function, Signal
from foveate.core.traits import Traits
from foveate.ops.farthest import farthest_first

AT_ONCE = 1024
"""Rows that are pushed at a time, or as many as there are tokens if these are more."""
EQUAL = 1e-3
"""Sensitivities that differ by no more than this share are equal: float32 leaves so much of a difference to chance."""


def sensitivity(features: Tensor, project: Callable[[Tensor], Tensor], directions: Tensor, h: float) -> Tensor:
    """Mean length ``[I, N]`` of the central difference of ``project`` along each direction, float32.

    Args:
        features: ``[I, N, D]``.
        project: ``[..., D]`` to ``[..., D']``.
        directions: ``[m, D]``, of any length but 0: they are brought to 1.
        h: half of the step.
    """
    x = features.float()
    steps = h * torch.nn.functional.normalize(directions.float(), dim=-1)
    total = torch.zeros_like(x[..., 0])
    at_once = max(1, AT_ONCE // total.numel())
    for start in range(0, len(steps), at_once):
        push = steps[start : start + at_once, None, None]
        moved = project(x + push).float() - project(x - push).float()
        total = total + torch.linalg.vector_norm(moved, dim=-1).sum(0)
    return total / (2 * h * len(directions))


def relative(sensitivities: Tensor) -> Tensor:
    """``[I, N]`` scaled to [0, 1] within each row; 1 if all are equal."""
    low, high = sensitivities.aminmax(dim=1, keepdim=True)
    return torch.where(high - low <= EQUAL * high, 1.0, (sensitivities - low) / (high - low + 1e-8))


@register
@dataclass(frozen=True)
class ZOOPrune(ItemTokens):
    """Sensitivity of the projector times distance of the projected tokens, greedily."""

    name = "zoo_prune"
    title = "ZOO-Prune"
    group = "before_llm"
    paper = "arXiv 2509.24837"
    helps = (
        "Any question and any encoder, where encoding may take longer: no attention is read, but the projector runs often."
    )
    needs = ("encoder features", "a projector that takes single tokens")

    keep: int | float = 0.2223
    directions: Annotated[int, AtLeast(1)] = 64
    """Random directions along which each token is pushed: the projector runs twice for each."""
    h: Annotated[float, AtLeast(1e-6)] = 0.01
    """Half of the step, in the units of the encoder's features. Where these are 10,000 times as long (80,000 times on
    reference-qwen), float32 leaves three digits of a sensitivity, and ties hang on rounding; a larger step leaves more."""
    rank: Annotated[int, AtLeast(1)] | None = None
    """Largest rank of the linear layers of the projector's copy that is pushed, as for LLaVA-NeXT; None = the projector."""
    positions: Positions = "auto"

    def budget(self) -> Budget:
        """Shares are rounded down, as in the code."""
        return Budget(self.keep, "floor")

    def check(self, traits: Traits) -> str | None:
        """Needs encoder features, and a projector that can be asked for single tokens."""
        if traits.encoder_layers is None:
            return f"needs encoder features, which are not available on {traits.family}; use divprune, uniform or random"
        if not traits.projects:
            return f"the projector of {traits.family} pools whole pictures, so no single token can be pushed; use divprune"
        return super().check(traits)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """What the projector is fed, and the projector."""
        return Features(cells=True), self._pushed

    @property
    def _pushed(self) -> Function:
        return Function("projector", rank=self.rank)

    def workspace(self, shape: Shape) -> int:
        """Features, pushed ones and what the projector makes of them on the way, and distances of the tokens."""
        pushed = max(AT_ONCE, shape.images * shape.image_rows) * (shape.image_width + shape.width) * FLOAT
        fed = 2 * shape.floats(shape.features)
        return super().workspace(shape) + 4 * pushed + fed + 3 * shape.pairs + 3 * shape.floats(shape.hidden)

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Push, spread, then restore raster order."""
        features = images.seen[Features(cells=True)]
        generator = torch.Generator().manual_seed(images.seed)
        drawn = upload(torch.randn(self.directions, features.shape[2], generator=generator), features.device)
        weight = relative(sensitivity(features, images.seen[self._pushed], drawn, self.h))
        return farthest_first(images.x, k, first=weight.argmax(1), weight=weight).sort(dim=1).values
