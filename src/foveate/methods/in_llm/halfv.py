"""HalfV: few layers in, keep attended and diverse tokens; deep in, freeze them or cut them once more, as the LLM has it.

Paper: "From Inheritance to Saturation: Disentangling the Evolution of Visual Redundancy for Architecture-Aware MLLM
Inference Acceleration", arXiv 2604.16462. As the released code of Qwen2.5-VL: attention is a softmax over the pictures' rows
alone, without the usual factor (``scaled`` brings it back), unrotated at the first stage. Differs from it: the second stage
ranks the tokens that are left (its slice of the released code runs into the text). Reconstructed: the form for Vicuna and
Mistral, whose code is not public, freezes as ShortV does and takes its numbers from the published command lines; other
depths get the same shares of it, and all pictures of a prompt are one pool.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Literal, NamedTuple, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Edit, Layout
from foveate.core.method import Plan, Routing, Tokens
from foveate.core.parameters import AtLeast, In
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Function, Hidden, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import row_logits
from foveate.ops.farthest import farthest_first
from foveate.ops.select import first_rows, top_rows


class Backbone(NamedTuple):
    """Published numbers for a kind of LLM: both layers of so many, the first stage's shares, and what the second does."""

    layers: tuple[int, int]
    depth: int
    ivr_ratio: float
    attention: float
    ssr: Literal["freeze", "prune"]


VICUNA = Backbone((3, 15), 32, 0.5, 0.2, "freeze")
QWEN = Backbone((2, 21), 28, 0.25, 0.2, "prune")


def attended(query: Tensor, key: Tensor, row: Tensor, visual: Tensor, scaled: bool = False) -> Tensor:
    """Attention that one row gives to the visual rows, normalised over these: the mean over heads, float32.

    Args:
        query: ``[B, H, N, d]``.
        key: ``[B, Hkv, N, d]``.
        row: ``[B, 1]`` the row that asks.
        visual: ``[B, N]`` bool.
        scaled: whether logits are divided by the root of d.

    Returns:
        ``[B, N]``, 0 for other rows.
    """
    heads, width = query.shape[1], query.shape[3]
    asking = query.gather(2, row[:, None, :, None].expand(-1, heads, -1, width))
    logits = row_logits(asking, key, width**-0.5 if scaled else 1.0)[:, :, 0]
    return logits.masked_fill(~visual[:, None], torch.finfo(logits.dtype).min).softmax(-1).mean(1).masked_fill(~visual, 0)


@register
@dataclass(frozen=True)
class HalfV(Tokens, Routing):
    """Attended and diverse tokens before layer ``ivr_layer``; from ``ssr_layer`` on frozen ones, or fewer."""

    name = "halfv"
    title = "HalfV"
    group = "in_llm"
    paper = "arXiv 2604.16462"
    helps = "One recipe for LLMs that differ: where deep layers no longer change visual tokens, they are spared or dropped."
    needs = ("decoder queries and keys (1 layer for each stage)", "hidden states (1 layer for each stage)", "the final norm")
    identity_at = {"ivr_ratio": 1.0, "ssr": "prune", "ssr_ratio": 1.0}  # noqa: RUF012

    ivr_layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer, counted from 0, before which inherited redundancy (IVR) goes; None = 3 of 32, or 2 of 28 under
    M-RoPE."""
    ivr_ratio: Annotated[float, In(0, 1)] | None = None
    """Share of the visual tokens that it leaves; None = 0.5, or 0.25 under M-RoPE."""
    attention: Annotated[float, In(0, 1)] = 0.2
    """Share of those that attention chooses; the others are as far from what is chosen as can be."""
    ssr_layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer from which on visual tokens are saturated (SSR); None = 15 of 32, or 21 of 28 under M-RoPE."""
    ssr: Literal["auto", "freeze", "prune"] = "auto"
    """What becomes of them there: no layer updates them any more (``"freeze"``, for Vicuna and Mistral), or the best
    attended stay (``"prune"``, for Qwen); ``"auto"`` prunes under M-RoPE, else freezes."""
    ssr_ratio: Annotated[float, In(0, 1)] = 0.05
    """Share of the original visual tokens that is left if they are pruned there."""
    scaled: bool = False
    """Whether logits are divided by the root of the heads' width, as in the model itself."""

    def fitted(self, traits: Traits) -> Self:
        """The published numbers at the same shares of the depth."""
        backbone = QWEN if traits.rotary_rows > 1 else VICUNA
        ivr_layer, ssr_layer = traits.same_depth(backbone.layers, of=backbone.depth)
        return replace(
            self,
            ivr_layer=ivr_layer if self.ivr_layer is None else self.ivr_layer,
            ivr_ratio=backbone.ivr_ratio if self.ivr_ratio is None else self.ivr_ratio,
            ssr_layer=ssr_layer if self.ssr_layer is None else self.ssr_layer,
            ssr=backbone.ssr if self.ssr == "auto" else self.ssr,
        )

    def check(self, traits: Traits) -> str | None:
        """The stages must follow each other, and a layer with attention must stand before each; freezing needs a mask."""
        fit = self.fitted(traits)
        first, second = fit.ivr_layer or 1, fit.ssr_layer or 1
        if second <= first:
            return f"ssr_layer={second}: must be behind ivr_layer={first}"
        if fit.ssr == "freeze" and traits.mask_free:
            return "frozen rows need a mask, which FlashAttention does not take; load with attn_implementation='sdpa'"
        ranked = [first - 1, second - 1] if fit.ssr == "prune" else [first - 1]
        return traits.refuse_layers("ivr_layer", first, attention=ranked[:1]) or traits.refuse_layers(
            "ssr_layer", second, attention=ranked[1:]
        )

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of the first stage's layer, and of the second's if tokens leave there."""
        fit = self.fitted(traits)
        layers = (fit.ivr_layer or 1, fit.ssr_layer or 1) if fit.ssr == "prune" else (fit.ivr_layer or 1,)
        return tuple(Site("decoder", layer) for layer in layers)

    def routed(self, traits: Traits) -> tuple[int, ...]:
        """The frozen layers."""
        fit = self.fitted(traits)
        return tuple(range(fit.ssr_layer or 1, traits.decoder_layers)) if fit.ssr == "freeze" else ()

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """What entered the layers before, their queries and keys, and the final norm."""
        before = [site.layer - 1 for site in self.sites(traits)]
        asked = (Function("query_key", layer) for layer in before)
        return *(Hidden(Site("decoder", layer)) for layer in before), *asked, Function("norm")

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Both stages, one in each half of the layers."""
        half = traits.decoder_layers // 2
        layers = {"ivr_layer": Range(1, half), "ssr_layer": Range(half + 1, traits.decoder_layers - 1)}
        shares = {"ivr_ratio": Range(0.05, 1.0, log=True), "ssr_ratio": Range(0.0, 1.0)}
        return {**layers, **shares, "scaled": (self.scaled,)}

    def workspace(self, shape: Shape) -> int:
        """Queries and keys of a layer; the tokens at length 1, as given and once more, and their distances; frozen rows."""
        ranked = shape.hidden + 4 * (shape.queries + shape.keys) + shape.attention(1)
        spread = shape.hidden + 4 * shape.floats(shape.hidden) + 3 * shape.pairs
        return shape.edits + ranked + spread + (0 if self.ssr == "prune" else shape.routing)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt; shares are of the tokens that it came with."""
        first = site.layer == self.ivr_layer
        ratio = (self.ivr_ratio or 0.0) if first else self.ssr_ratio
        wanted = [Budget(ratio, "floor").of(total) if ratio else 0 for total in layout.originals]
        counts = tuple(map(min, wanted, layout.visual))
        if counts == layout.visual:
            return None
        if not any(counts):
            return layout.keeping(torch.zeros_like(layout.valid), counts)
        visual = layout.rows(*VISUAL)
        query, key = seen[Function("query_key", site.layer - 1)](
            seen[Hidden(Site("decoder", site.layer - 1))], layout, rope=not first
        )
        scores = attended(query, key, layout.last, visual, self.scaled)
        best = tuple(int(self.attention * count) for count in counts) if first else counts
        chosen = top_rows(scores, visual, best)
        missing = tuple(count - ranked for count, ranked in zip(counts, best))
        if any(missing):
            chosen |= self._far_from(chosen, seen[Function("norm")](x), layout, missing)
        return layout.keeping(chosen, counts)

    def _far_from(self, chosen: Tensor, x: Tensor, layout: Layout, counts: tuple[int, ...]) -> Tensor:
        """Mask ``[B, N]`` of ``counts[b]`` visual rows of ``x`` ``[B, N, D]`` far from those ``chosen`` ``[B, N]``."""
        rows = last_of(layout.rows(*VISUAL), max(layout.visual))
        index = rows.clamp(min=0)
        points = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
        there = rows >= 0
        with about(torch.arange(len(x), device=x.device), index, layout.shape):
            order = farthest_first(points, max(counts), valid=there, taken=chosen.gather(1, index) & there)
        return first_rows(order, index, counts, layout.shape[1])

    def plan(self, layer: int, x: Tensor, layout: Layout, seen: Seen, state: State) -> Plan | None:
        """All visual rows are frozen."""
        return Plan.of_text(layout, frozen=True)
