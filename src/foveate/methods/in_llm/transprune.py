"""TransPrune: keep the visual tokens that middle layers stretch and turn most, and that the question attends to.

Paper: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", arXiv 2507.20630. Two scores of
equal weight: token transition variation (TTV), summed over attention and MLP of several layers, and instruction-guided
attention (IGA) in the layer behind each cut. Layers are counted from 1, as in the paper's configuration. Positions are
renumbered after each cut, as released; under M-RoPE the original ones stay (ours). Reconstructed: the softmax over
directions is of each sample, not of the batch; several images of a prompt are ranked jointly; other depths cut at the same
shares of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import Layers, Shares
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Halves, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK, from_rows
from foveate.ops.select import top_rows

SUM = "transprune"
"""Key of the transition variation so far."""


def transition(x: Tensor, y: Tensor, valid: Tensor) -> Tensor:
    """How much a module changes each token: length ratio, weighed by the softmax of the change of direction.

    Args:
        x: ``[B, N, D]`` the module's input, after its norm.
        y: ``[B, N, D]`` its output, before the residual.
        valid: ``[B, N]`` bool, rows of the prompt.

    Returns:
        ``[B, N]`` float32, 0 for other rows.
    """
    x, y = x.float(), y.float()
    ratio = y.norm(dim=-1) / x.norm(dim=-1).clamp(min=torch.finfo(x.dtype).tiny)
    turned = 1 - torch.cosine_similarity(x, y, dim=-1)
    weight = turned.masked_fill(~valid, float("-inf")).softmax(-1)
    return torch.where(valid, ratio * weight, 0)


def question_scores(query: Tensor, key: Tensor, question: Tensor, valid: Tensor) -> Tensor:
    """Attention ``[B, N]`` that rows get from the question, the mean over its rows and heads.

    Args:
        query, key: ``[B, H or Hkv, N, d]``, rotated.
        question: ``[B, Q]`` rows, -1 = padding.
        valid: ``[B, N]`` bool.
    """
    earlier = torch.arange(valid.shape[1], device=valid.device) <= question[..., None]
    return from_rows(query, key, question, earlier & valid[:, None])


def share(scores: Tensor, visual: Tensor) -> Tensor:
    """``scores`` ``[B, N]`` of the ``visual`` rows, summing to 1 in each sample."""
    scores = scores.masked_fill(~visual, 0)
    return scores / (scores.sum(1, keepdim=True) + 1e-8)


@register
@dataclass(frozen=True)
class TransPrune(Tokens):
    """After each of ``layers`` keep the share of ``ratios`` of the original visual tokens."""

    name = "transprune"
    title = "TransPrune"
    group = "in_llm"
    paper = "arXiv 2507.20630"
    helps = "Where attention alone misleads: how layers change a token counts as much as what the question attends to."
    needs = ("both halves of some decoder layers", "decoder queries and keys (1 layer for each stage)")
    identity_at = {"layers": None, "ratios": (1.0, 1.0, 1.0)}  # noqa: RUF012

    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Layers, counted from 1, after which tokens are dropped; None = 7, 9 and 12 of 32."""
    ratios: Annotated[tuple[float, ...], Shares()] = (0.875, 0.625, 0.125)
    """Share of the original visual tokens of a sample that stays after each of ``layers``."""
    accumulate: Annotated[tuple[int, ...], Layers()] | None = None
    """Layers, counted from 1, whose transitions add up; None = from the first to the last of ``layers``."""

    def __post_init__(self) -> None:
        super().__post_init__()
        stages = 3 if self.layers is None else len(self.layers)
        self.require(len(self.ratios) == stages, "ratios", f"must be one for each of the {stages} stages; see layers")

    def fitted(self, traits: Traits) -> Self:
        """Stages at the published shares of the depth."""
        layers = self.layers if self.layers is not None else traits.same_depth((7, 9, 12), of=32)
        between = tuple(range(layers[0], layers[-1] + 1)) if layers else ()
        return replace(self, layers=layers, accumulate=between if self.accumulate is None else self.accumulate)

    def check(self, traits: Traits) -> str | None:
        """Every stage needs a layer behind it."""
        fit = self.fitted(traits)
        layers, accumulate = fit.layers or (), fit.accumulate or ()
        if accumulate and (not layers or accumulate[-1] > layers[-1]):
            return f"accumulate={accumulate}: must not go on behind the last of layers={layers}"
        return traits.refuse_layers("layers", layers, attention=layers)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Behind every layer that is listed."""
        fit = self.fitted(traits)
        return tuple(Site("decoder", layer) for layer in sorted({*(fit.layers or ()), *(fit.accumulate or ())}))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Halves where transitions add up, queries and keys of the layer behind each stage."""
        fit = self.fitted(traits)
        halves = tuple(Halves(Site("decoder", layer - 1)) for layer in fit.accumulate or ())
        return halves + tuple(Function("query_key", layer) for layer in fit.layers or ())

    def workspace(self, shape: Shape) -> int:
        """Both halves of a layer and their changes; queries and keys of the next, and what the question attends to."""
        halves = 4 * shape.hidden + 5 * shape.floats(shape.hidden)
        asked = shape.attention(min(CHUNK, shape.rows - shape.visual))
        return shape.edits + halves + 4 * (shape.queries + shape.keys) + asked

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Add up transitions; at a stage rank the visual rows of each sample jointly."""
        if site.layer in (self.accumulate or ()):
            (x1, y1), (x2, y2) = seen[Halves(Site("decoder", site.layer - 1))]
            changed = transition(x1, y1, layout.prompt) + transition(x2, y2, layout.prompt)
            state.put("prefill", SUM, state.get("prefill", SUM, 0) + changed, rows=True)
        layers = self.layers or ()
        if site.layer not in layers:
            return None
        ratio = self.ratios[layers.index(site.layer)]
        counts = tuple(min(int(total * ratio), alive) for total, alive in zip(layout.originals, layout.visual))
        if counts == layout.visual:
            return None
        query, key = seen[Function("query_key", site.layer)](x, layout)
        visual = layout.rows(*VISUAL)
        asked = question_scores(query, key, layout.question_rows, layout.prompt)
        varied = state.get("prefill", SUM, torch.zeros_like(asked))
        best = top_rows(share(varied, visual) + share(asked, visual), visual, counts)
        return layout.keeping(best, counts, "auto")
