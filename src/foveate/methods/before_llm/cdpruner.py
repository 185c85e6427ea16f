"""CDPruner: keep tokens that match the question and are unlike each other, by a determinantal point process (DPP).

Paper: "Beyond Attention or Similarity: Maximizing Conditional Diversity for Token Pruning in MLLMs", arXiv 2506.10967.
With a companion, relevance is the *negated* cosine between CLIP embeddings of patches and question, as released (patches of
the last layer but one correlate negatively with the text). Without one it is the cosine between projected tokens and the
mean embedding of the question, as in OpenVINO GenAI, which is not by the authors; its two-halves shortcut for videos is left
out. Differs from the released code: relevance is scaled to [0, 1] within each item, not over all tiles of a picture (under
tiles the two differ); equal relevance leaves a plain DPP instead of dividing by zero; a budget beyond the rank of the
features is filled up by index instead of taking square roots of rounding errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.parameters import In
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Aligned, Question, Signal
from foveate.core.traits import Traits
from foveate.ops.dpp import greedy_map

EPSILON = 1e-6


def unit(x: Tensor) -> Tensor:
    """``[..., d]`` at length 1, float32; zero stays zero."""
    return torch.nn.functional.normalize(x.float(), dim=-1)


def likeness(tokens: Tensor, texts: Sequence[Tensor]) -> Tensor:
    """Cosine ``[I, N]`` of ``tokens`` ``[I, N, d]`` with each image's text: its segments' ``[M, d]`` mean over them."""
    direction = torch.stack([unit(segments).mean(0) for segments in texts])
    return (unit(tokens) @ direction[..., None])[..., 0]


def scaled(relevance: Tensor, floor: float) -> Tensor:
    """Relevance ``[I, N]`` scaled to [0, 1] within each row, raised by ``floor`` before the division; 1 if all are equal."""
    low, high = relevance.aminmax(dim=1, keepdim=True)
    spread = high - low
    return torch.where(spread < EPSILON, 1.0, (relevance - low + floor) / spread.clamp(min=EPSILON))


def weighed(relevance: Tensor, weight: float) -> Tensor:
    """Relevance as the kernel takes it: as it is at ``weight`` 1, not at all at 0, exponentially in between."""
    return relevance if weight == 1 else torch.exp(weight / (2 * (1 - weight)) * relevance)


@register
@dataclass(frozen=True)
class CDPruner(ItemTokens):
    """Greedy MAP of a DPP: relevance to the question times similarity of the projected tokens times relevance."""

    name = "cdpruner"
    title = "CDPruner"
    group = "before_llm"
    paper = "arXiv 2506.10967"
    helps = (
        "Small budgets and a question about one thing among many: what is kept differs with the question and does not "
        "repeat itself."
    )
    asks = True
    needs = ("projected tokens", "question embeddings, or a companion text tower")

    keep: int | float = 64
    relevance: Literal["auto", "clip", "embedding"] = "auto"
    """Where relevance to the question comes from: the companion's space (``"clip"``), the language model's own embeddings
    (``"embedding"``), or the first if there is a companion (``"auto"``).
    """
    negate: bool = True
    """Whether the companion's cosine counts against a token, as released for CLIP; other towers may not need it."""
    weight: Annotated[float, In(0, 1)] | None = None
    """Of relevance against diversity; None = 1 with a companion, 0.5 without, as in either code."""
    positions: Positions = "auto"

    def check(self, traits: Traits) -> str | None:
        """The companion must be there if it is asked for."""
        if self.relevance == "clip" and not self._asks_companion(traits):
            return (
                f"relevance='clip': needs a companion text tower and encoder features, which {traits.family} has not here; "
                "give a companion or use relevance='embedding'"
            )
        return super().check(traits)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Both sides in the companion's space; the language model's own embeddings need no signal."""
        return (Aligned(), Question()) if self._asks_companion(traits) else ()

    def workspace(self, shape: Shape) -> int:
        """Similarities of all tokens, the factorisation, and both sides of relevance."""
        return super().workspace(shape) + 3 * shape.pairs + 3 * shape.floats(shape.hidden) + 2 * shape.floats(shape.features)

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Relevance, the DPP, then raster order."""
        if self.relevance != "embedding" and Aligned() in images.seen:
            cosine = likeness(images.seen[Aligned()], images.companion)
            relevance = scaled(-cosine if self.negate else cosine, floor=EPSILON)
            weight = 1.0 if self.weight is None else self.weight
        else:
            # The sum of the question's embeddings points where their mean does; rows of padding are zero.
            question = images.question.float().sum(1, keepdim=True)
            relevance = scaled(likeness(images.x, question.unbind()), floor=0)
            weight = 0.5 if self.weight is None else self.weight
        return greedy_map(images.x, weighed(relevance, weight), k)[0].sort(dim=1).values

    def _asks_companion(self, traits: Traits) -> bool:
        return self.relevance != "embedding" and traits.companion and traits.encoder_layers is not None
