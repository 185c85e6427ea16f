"""CoIn: tokens that say much and match the question, and that span a large volume together.

Paper: "CoIn: Coverage and Informativeness-Guided Token Reduction for Efficient Large Multimodal Models", CVPR 2026, no arXiv
id. Reconstructed from public notes that quote its formulas; no code is public. Reconstructed: ``alpha``, ``beta`` and
``ridge`` (the paper's are not given: they were searched for on each model); the question is the mean embedding of the text
behind the picture; the gain in volume is scaled to [0, 1] over the candidates of each step (``scale="step"``; the notes say
that both terms are normalised, not how; ``"raw"`` takes the formula as printed); raster order; every grid on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import AtLeast, In
from foveate.core.positions import Positions
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.ops.dpp import pivoted

Scale = Literal["step", "raw"]
TINY = 1e-12


def unit_range(x: Tensor) -> Tensor:
    """``[I, N]`` scaled to [0, 1] within each row, nan aside; 0 if all are equal."""
    low = x.nan_to_num(nan=float("inf")).amin(1, keepdim=True)
    high = x.nan_to_num(nan=float("-inf")).amax(1, keepdim=True)
    return (x - low) / (high - low).clamp(min=TINY)


def informativeness(x: Tensor, text: Tensor, beta: float, p: float = 2.0) -> Tensor:
    """``[I, N]``: ``beta`` of each token's norm, the rest of its cosine with the text, each scaled to [0, 1].

    Args:
        x: ``[I, N, D]`` tokens.
        text: ``[I, D]`` mean embedding of the prompt's text.
        beta: share of the norm.
        p: which norm.
    """
    x, text = x.float(), text.float()
    norm = torch.linalg.vector_norm(x, ord=p, dim=2)
    return beta * unit_range(norm) + (1 - beta) * unit_range(torch.cosine_similarity(x, text[:, None], dim=2))


def covering(x: Tensor, info: Tensor, k: int, alpha: float, ridge: float = 1e-3, scale: Scale = "step") -> Tensor:
    """Greedy maximum of ``(1 - alpha) * sum info + alpha * log det(F F^T + lambda)``.

    Args:
        x: ``[I, N, D]`` tokens F.
        info: ``[I, N]``.
        k: budget.
        alpha: share of the volume.
        ridge: lambda, in mean squared norms of the tokens.
        scale: whether the gains in volume are scaled to [0, 1] over the candidates of each step.

    Returns:
        ``[I, k]`` indices in the order of choice.
    """
    x = x.float()
    base = ridge * x.square().sum(2).mean(1, keepdim=True).clamp(min=TINY)

    def score(left: Tensor) -> Tensor:
        gain = left.log()
        return (1 - alpha) * info + alpha * (unit_range(gain) if scale == "step" else gain)

    return pivoted(x, k, score, base)[0]


@register
@dataclass(frozen=True)
class CoIn(ItemTokens):
    """Informativeness plus the log-volume that a token adds, greedily, on the projected tokens."""

    name = "coin"
    title = "CoIn"
    group = "before_llm"
    paper = "CVPR 2026"
    helps = "Questions about one thing among many: tokens near the question go first, the rest of the picture stays covered."
    needs = ("projected tokens", "question embeddings")
    asks = True

    keep: int | float = 64
    alpha: Annotated[float, In(0, 1)] = 0.5
    """Share of the volume, the rest is the informativeness'."""
    beta: Annotated[float, In(0, 1)] = 0.5
    """Share of a token's norm in its informativeness, the rest is its likeness to the question."""
    ridge: Annotated[float, AtLeast(1e-6)] = 1e-3
    """What the determinant's diagonal is raised by, in mean squared norms of the tokens."""
    norm: Annotated[float, AtLeast(1)] = 2.0
    """Which norm of a token is its salience: the p of Lp."""
    scale: Scale = "step"
    """Whether gains in volume are scaled to [0, 1] over the candidates of each step, or taken as they are (``"raw"``)."""
    positions: Positions = "auto"

    def workspace(self, shape: Shape) -> int:
        """The tokens as float32, their products, and the factorisation."""
        return super().workspace(shape) + 3 * shape.pairs + 4 * shape.floats(shape.hidden)

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Cover, then restore raster order."""
        # The sum of the question's embeddings points where their mean does; rows of padding are zero.
        info = ranked(informativeness(images.x, images.question.float().sum(1), self.beta, self.norm))
        return covering(images.x, info, k, self.alpha, self.ridge, self.scale).sort(dim=1).values
