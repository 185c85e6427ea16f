"""HAWK: what the question's own words match in the picture, head by head, heads weighed by what they do for vision.

Paper: "HAWK: Head Importance-Aware Visual Token Pruning in Multimodal Models", arXiv 2604.07812. Queries of the question and
keys of the visual tokens are those of the first decoder layer on the bare embeddings, without rotation; all pictures of a
prompt are one pool. The published head weights of Qwen2.5-VL-7B are a preset. Reconstructed: how the paper measures heads is
not public; here `foveate calibrate hawk` takes a head out of all layers at once and measures how far the last prompt token's
distribution moves. On models without either all heads weigh the same. The code finds the question by Qwen's special tokens,
here it is the text behind the last picture without the ``skip`` first and the ``tail`` last rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor

from foveate.core.artifact import Fingerprint
from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Offline, Tokens
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, Keep
from foveate.core.positions import Positions
from foveate.core.recipe import Recipe
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import row_logits
from foveate.ops.divergence import divergence
from foveate.ops.select import top_rows

Normalise = Literal["l2", "softmax", "minmax"]
TINY = 1e-12
# fmt: off
QWEN_7B = (
    0.0875, 0.3000, 0.0480, 0.0321, 0.0104, 0.0102, 0.0336, 0.0460, 0.0540, 0.0472, 0.0234, 0.0537, 0.0109, 0.0573,
    0.0276, 0.0403, 0.0429, 0.0352, 0.0162, 0.0519, 0.0553, 0.0266, 0.0222, 0.0480, 0.0337, 0.0250, 0.0000, 0.0224,
)
# fmt: on
PRESETS = {Fingerprint("qwen2_5_vl", 28, 3584, 152064): QWEN_7B}
QWEN_SKIP, QWEN_TAIL = 1, 5
"""``<|vision_end|>``, and ``<|im_end|>``, a line end and ``<|im_start|>assistant`` with another."""


def instruction(question: Tensor, skip: int, tail: int) -> Tensor:
    """The rows ``[B, N]`` (bool) of a ``question`` ``[B, N]`` but for the ``skip`` first and the ``tail`` last ones.

    Where nothing is left, only the first ones are left out, and where nothing is left then, none.
    """
    behind = question & (question.cumsum(1) > skip)
    inside = behind & (question.flip(1).cumsum(1).flip(1) > tail)
    behind = torch.where(behind.any(1, keepdim=True), behind, question)
    return torch.where(inside.any(1, keepdim=True), inside, behind)


def matches(query: Tensor, key: Tensor, asking: Tensor) -> Tensor:
    """Mean logit ``[B, H, N]`` of each key from the rows that ask, float32.

    Args:
        query: ``[B, H, N, d]``.
        key: ``[B, Hkv, N, d]``.
        asking: ``[B, N]`` bool, at least one of each sample.
    """
    # The mean of the logits is that of the mean query.
    weight = asking / asking.sum(1, keepdim=True)
    mean = (weight[:, None, None] @ query.float()).to(torch.float32)
    return row_logits(mean, key, query.shape[3] ** -0.5)[:, :, 0].nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)


def weighed(logits: Tensor, visual: Tensor, weights: Tensor, normalise: Normalise = "l2") -> Tensor:
    """Scores ``[B, N]`` of the ``visual`` rows ``[B, N]`` (bool), 0 elsewhere.

    Args:
        logits: ``[B, H, N]``.
        visual: the tokens that are ranked.
        weights: ``[H]``.
        normalise: how each head's logits are made comparable, over the visual rows.
    """
    rows = visual[:, None]
    if normalise == "softmax":
        scores = logits.masked_fill(~rows, torch.finfo(logits.dtype).min).softmax(-1)
    elif normalise == "minmax":
        low = logits.masked_fill(~rows, float("inf")).amin(-1, keepdim=True)
        high = logits.masked_fill(~rows, float("-inf")).amax(-1, keepdim=True)
        scores = (logits - low) / (high - low).clamp(min=TINY)
    else:
        scores = torch.nn.functional.normalize(logits.masked_fill(~rows, 0), dim=-1)
    return (weights[:, None] * scores).sum(1).masked_fill(~visual, 0)


@register
@dataclass(frozen=True)
class Hawk(Tokens, Offline):
    """Keep the tokens whose first-layer keys the question's queries match, each head by its weight."""

    name = "hawk"
    title = "HAWK"
    group = "before_llm"
    paper = "arXiv 2604.07812"
    helps = "Questions that name what they are about: what matches their words in the first layer stays."
    needs = ("projected tokens", "decoder queries and keys (the first layer)")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.2
    """Visual tokens that are left of a sample, all of its pictures together; shares are rounded up."""
    weights: tuple[Annotated[float, AtLeast(0)], ...] | None = None
    """Weight of each head; () = all the same; None = calibrated ones, or else the model's preset, or else all the same."""
    normalise: Normalise = "l2"
    """How a head's logits over the visual tokens are made comparable: by their length, a softmax, or scaled to [0, 1]."""
    skip: Annotated[int, AtLeast(0)] | None = None
    """Rows behind the last picture that are not yet the question; None = 1 for Qwen, else 0."""
    tail: Annotated[int, AtLeast(0)] | None = None
    """Rows at the end of the prompt that are the template's, no longer the question; None = 5 for Qwen, else 0."""
    positions: Positions = "anchor"
    """Rotary positions of what stays: their own, or as `foveate.core.layout.Edit` says."""

    def fitted(self, traits: Traits) -> Self:
        """The model's weights and template."""
        skip, tail = (QWEN_SKIP, QWEN_TAIL) if traits.family.startswith("qwen") else (0, 0)
        return replace(
            self,
            weights=self._weights(traits),
            skip=skip if self.skip is None else self.skip,
            tail=tail if self.tail is None else self.tail,
        )

    def check(self, traits: Traits) -> str | None:
        """A weight for each head; contiguous positions have no meaning under M-RoPE."""
        weights = self._weights(traits)
        if weights and len(weights) != traits.heads:
            return f"weights={self.weights}: must be one for each of the {traits.heads} heads, or () for all the same"
        return traits.refuse_positions(self.positions)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Queries and keys of the first layer."""
        return (Function("query_key", 0),)

    def workspace(self, shape: Shape) -> int:
        """Queries and keys of a layer, and a row of logits."""
        return shape.edits + shape.hidden + 4 * (shape.queries + shape.keys) + shape.attention(1)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt; the budget is a share of the tokens that it came with."""
        budget = Budget(self.keep, "ceil")
        counts = tuple(min(budget.of(there), alive) for there, alive in zip(layout.originals, layout.visual))
        if counts == layout.visual:
            return None
        query, key = seen[Function("query_key", 0)](x, layout, rope=False)
        logits = matches(query, key, instruction(layout.question, self.skip or 0, self.tail or 0))
        visual = layout.rows(*VISUAL)
        weights = upload(self.weights or (1.0,) * logits.shape[1], x.device)
        return layout.keeping(
            top_rows(weighed(logits, visual, weights, self.normalise), visual, counts), counts, self.positions
        )

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Take one head at a time out of all layers and see how far the last prompt token's distribution moves."""
        heads = call.traits.heads
        call.begin("taking out one head at a time", (heads + 1) * call.batches)
        whole = call.logits(Recipe())
        moved = torch.stack([divergence(whole, call.logits(Recipe(), without_head=head)).mean() for head in range(heads)])
        return {"weights": (moved / moved.sum().clamp(min=TINY)).tolist()}

    def _weights(self, traits: Traits) -> tuple[float, ...]:
        if self.weights is not None:
            return self.weights
        numbers = self.numbers(traits)
        return PRESETS.get(traits.fingerprint, ()) if numbers is None else tuple(numbers["weights"])
