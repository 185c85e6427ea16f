"""ALVTS: before every layer, a low-rank copy of its attention picks the visual tokens that the layer is to work on.

The others skip that layer unchanged, without keys and values in it, and may be picked by a later one. Paper: "One Layer's
Trash is Another Layer's Treasure: Adaptive Layer-wise Visual Token Selection in LVLMs", arXiv 2606.14277. No code was
published. Reconstructed: the selector reads the layer's normed input; heads have a softmax each and are averaged
(``head_mode="joint"``: one softmax over the full width); its attention is causal in row order (``causal``) and without
rotation (``rope``), while the teacher's is rotated; all rows that are not visual count as text; several images are ranked
jointly. Alignment (``foveate calibrate alvts``): Adam, one batch of samples a step; ``steps=0`` leaves the truncated SVD.
Biases and norms of queries and keys, which some families have, are not in the factors: alignment makes up for what it can.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Offline, Plan, Routing
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, Keep, Shares
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Function, Hidden, Numbers, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.attention import CHUNK, Allowed, causal, received
from foveate.ops.select import top_rows

HeadMode = Literal["mean", "joint"]
FACTORS = ("query_in", "query_out", "key_in", "key_out")


def low_rank(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors ``[R, D]`` and ``[out, R]`` whose product is the best approximation of ``weight`` ``[out, D]`` of a rank."""
    left, singular, right = torch.linalg.svd(weight.float(), full_matrices=False)
    root = singular[:rank].sqrt()
    return root[:, None] * right[:rank], left[:, :rank] * root


def projected(x: Tensor, inner: Tensor, outer: Tensor, width: int) -> Tensor:
    """Heads ``[B, H, n, d]`` of width ``d`` that the factors ``[R, D]`` and ``[H * d, R]`` make of ``x`` ``[B, n, D]``."""
    made = x @ inner.T.to(x.dtype) @ outer.T.to(x.dtype)
    return made.reshape(*made.shape[:2], -1, width).transpose(1, 2)


def context_and_relevance(
    query: Tensor, key: Tensor, visual: Tensor, text: Tensor, allowed: Allowed | None = None, head_mode: HeadMode = "mean"
) -> Tensor:
    """Attention received from visual rows times attention received from text rows.

    Args:
        query: ``[B, H, n, d]``.
        key: ``[B, Hkv, n, d]``.
        visual: ``[B, n]`` bool.
        text: ``[B, n]`` bool.
        allowed: which query may see which key; None = all.
        head_mode: a softmax for each head, averaged, or one over the full width.

    Returns:
        ``[B, n]`` float32: each factor is the mean over the queries of its kind.
    """
    scale = query.shape[-1] ** -0.5
    if head_mode == "joint":
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        query, key = (heads.transpose(1, 2).flatten(2)[:, None] for heads in (query, key))
    queries = torch.stack([visual, text], dim=1).float()
    mean = queries / queries.sum(-1, keepdim=True).clamp(min=1)
    from_visual, from_text = received(query, key, mean, scale, allowed).unbind(1)
    return from_visual * from_text


def misfit(scores: Tensor, teacher: Tensor, visual: Tensor, valid: Tensor) -> Tensor:
    """Mean over visual rows of the squared distance of both scores ``[B, n]``, each times the square of the prompt's length.

    Scores are products of two means of probabilities, of the order of that square's inverse.
    """
    unit = valid.sum(1, keepdim=True) ** 2
    return (((scores - teacher) * unit) ** 2 * visual).sum() / visual.sum().clamp(min=1)


@register
@dataclass(frozen=True)
class ALVTS(Routing, Offline):
    """Let each layer work on all text and on the share ``keep`` of the visual tokens that it would attend to."""

    name = "alvts"
    title = "ALVTS"
    group = "in_llm"
    paper = "arXiv 2606.14277"
    helps = "Where no token may be lost for good: what one layer passes by, a later one may pick."
    needs = ("low-rank selectors (calibrated)",)
    identity_at = {"keep": 1.0, "ratios": None}  # noqa: RUF012
    bound = ("head_mode", "causal", "rope", "rank", "steps", "rate")

    keep: Annotated[int | float, Keep()] = 1 / 3
    """Visual tokens of a sample that each layer works on, all of its pictures together."""
    ratios: Annotated[tuple[float, ...], Shares()] | None = None
    """A share for each layer instead of ``keep``; 0 leaves a layer to the text alone."""
    head_mode: HeadMode = "mean"
    """Whether the selector has a softmax for each head and averages, or one over the full width (``"joint"``)."""
    causal: bool = True
    """Whether a token's attention is to earlier rows only."""
    rope: bool = False
    """Whether the selector rotates its queries and keys."""
    rank: Annotated[int, AtLeast(1)] | None = None
    """At calibration: rank of the factors; None = 1/16 of the model's width, which the published ranks are."""
    steps: Annotated[int, AtLeast(0)] = 200
    """At calibration: steps of alignment."""
    rate: Annotated[float, AtLeast(0)] = 1e-4
    """At calibration: learning rate."""

    def check(self, traits: Traits) -> str | None:
        """Needs queries in every layer, a share for each, and fitted selectors."""
        if traits.recurrent:
            return f"needs attention in every layer; layers {traits.recurrent} of {traits.family} are recurrent; use fastv"
        if self.ratios is not None and len(self.ratios) != traits.decoder_layers:
            return f"ratios={self.ratios}: must be {traits.decoder_layers} shares, one for each layer"
        if not self.routed(traits):
            return None
        return self.refuse_numbers(traits, "needs selectors fitted to this model")

    def routed(self, traits: Traits) -> tuple[int, ...]:
        """All layers that do not take everything."""
        if self.ratios is not None:
            return tuple(layer for layer, ratio in enumerate(self.ratios) if ratio < 1)
        whole = isinstance(self.keep, float) and self.keep == 1
        return () if whole else tuple(range(traits.decoder_layers))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The selectors, and the layers' norms."""
        functions = [Function("norm", layer) for layer in self.routed(traits)]
        functions += [Function("rotate", layer) for layer in self.routed(traits) if self.rope]
        return (Numbers(self.name), *functions) if functions else ()

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """The selectors are fitted to what these say."""
        return {"causal": (self.causal,), "rope": (self.rope,)}

    def workspace(self, shape: Shape) -> int:
        """Queries and keys of the selector, and attention of a chunk of them."""
        selector = 3 * shape.hidden + 2 * (shape.queries + shape.keys)  # the factors' rank is below the width
        return shape.routing + selector + shape.attention(CHUNK)

    def plan(self, layer: int, x: Tensor, layout: Layout, seen: Seen, state: State) -> Plan | None:
        """Text and the best visual rows of each sample are active."""
        counts = tuple(int(self.ratios[layer] * n) if self.ratios else self._budget().of(n) for n in layout.visual)
        if counts == layout.visual:
            return None
        numbers = seen[Numbers(self.name)]
        factors = [numbers[name][layer] for name in FACTORS]
        scores = self._scores(layer, seen[Function("norm", layer)](x), layout, seen, factors, numbers["head_width"])
        visual = layout.rows(*VISUAL)
        active = layout.valid & (~visual | top_rows(scores, visual, counts))
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, counts))
        return Plan(active, counts=live, visual=counts)

    @torch.no_grad()
    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Factors of every layer: truncated SVD, then aligned to the scores of the layer's own attention."""
        layers = range(call.traits.decoder_layers)
        rank = self.rank or max(call.weight(0, "query").shape[1] // 16, 1)
        factors = [
            [*low_rank(call.weight(layer, "query"), rank), *low_rank(call.weight(layer, "key"), rank)] for layer in layers
        ]
        signals: list[Signal] = [Hidden(Site("decoder", layer)) for layer in layers]
        for layer in layers:
            signals += [Function("norm", layer), Function("query_key", layer)]
            signals += [Function("rotate", layer)] if self.rope else []
        for of_layer in factors:
            for factor in of_layer:
                factor.requires_grad_()
        fits = [torch.optim.Adam(of_layer, self.rate) for of_layer in factors]
        call.begin("aligning", max(self.steps, 1))
        width = 0
        for step, (layout, seen) in enumerate(_batches(call, signals, max(self.steps, 1))):
            for layer in layers:
                x = seen[Hidden(Site("decoder", layer))]
                query, key = seen[Function("query_key", layer)](x, layout)
                width = query.shape[-1]
                if step < self.steps:
                    teacher = self._score(query, key, layout)
                    normed = seen[Function("norm", layer)](x).float()
                    with torch.enable_grad():
                        scores = self._scores(layer, normed, layout, seen, factors[layer], width)
                        loss = misfit(scores, teacher, layout.rows(*VISUAL), layout.valid)
                    fits[layer].zero_grad()
                    loss.backward()  # type: ignore[no-untyped-call]
                    fits[layer].step()
        stacked = {name: torch.stack([f[i].detach().cpu() for f in factors]) for i, name in enumerate(FACTORS)}
        return stacked | {"head_width": width}

    def _scores(self, layer: int, normed: Tensor, layout: Layout, seen: Seen, factors: list[Tensor], width: int) -> Tensor:
        """``[B, N]`` scores of the rows that enter a layer, behind its norm, by its factors."""
        # A head is narrower than the rank, so the products of the factors are formed, not their R x R core.
        query = projected(normed, factors[0], factors[1], width)
        key = projected(normed, factors[2], factors[3], width)
        if self.rope:
            query, key = (seen[Function("rotate", layer)](heads, layout.positions) for heads in (query, key))
        return self._score(query, key, layout)

    def _score(self, query: Tensor, key: Tensor, layout: Layout) -> Tensor:
        visual = layout.rows(*VISUAL)
        prompt = layout.prompt
        allowed = causal(prompt) if self.causal else lambda start, stop: prompt[:, None]
        return context_and_relevance(query, key, visual, prompt & ~visual, allowed, self.head_mode)

    def _budget(self) -> Budget:
        return Budget(self.keep, "floor")


def _batches(call: ModelCall, signals: list[Signal], steps: int) -> Iterator[tuple[Layout, Seen]]:
    """``steps`` batches, the calibration samples from the start again where they are fewer."""
    done = 0
    while done < steps:
        before = done
        for batch in call.read(*signals):
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise FoveateError("alvts: calibration needs at least one sample")
