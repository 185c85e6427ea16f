"""FlowCut: in every second block of the encoder, the patches go to which the least has flowed so far.

What flows to a patch in a block is the attention of CLS and the likeness of its value to that of CLS, times the length of
its value. A moving average over the blocks ranks the patches, and how evenly CLS looks around says how few go. Paper:
"FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language Models", arXiv 2505.19536. As in the
published code, the likeness is a softmax of the plain products of values (the paper speaks of cosines). The second stage,
inside the language model, is for pictures of many tokens: give ``layer=2``. Differs: a picture keeps what it keeps alone
(the code drops as many of each as of the one that loses most). Reconstructed: encoders without CLS are asked by the mean of
their queries and without the likeness, as the code does for Qwen2-VL. On LLaVA-NeXT each tile is pruned on its own, patches
of its borders, which are cut off behind the encoder, among the rest, as in the code; so only the second stage, which is
always there, keeps a promise. Line ends stay (the code leaves them out). Where tokens are no rows of the encoder (Qwen2-VL,
InternVL) or lie between some (LLaVA-OneVision), patches cannot go in its blocks, and the model is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Role
from foveate.core.shape import Shape
from foveate.core.signal import KeyValue, QueryKey, Rows, Seen, Signal, Site, Values
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.attention import row_logits
from foveate.ops.select import top_rows

FLOW = "flowcut"
BORDERS = "tiles"
"""The kind of site where some patches of a tile are no tokens."""


def value_norms(values: Tensor) -> Tensor:
    """``[B, N]`` L1 norms of the mean over heads of ``values`` ``[B, H, N, d]``, float32."""
    return values.mean(1, dtype=torch.float32).abs().sum(2)


def looked_at(query: Tensor, key: Tensor, seen: Tensor, scale: float) -> Tensor:
    """``[B, N]`` mean over heads of the softmax of the products of one ``query`` with each ``key``, float32.

    Args:
        query: ``[B, H, 1, d]``; ``key`` ``[B, H or Hkv, N, d]``.
        key: as above.
        seen: ``[B, N]`` bool: keys that the softmax is over; others get 0.
        scale: factor of the products.
    """
    return _shares(row_logits(query, key, scale), seen)


def flow(attention: Tensor, norms: Tensor, likeness: Tensor | None = None) -> Tensor:
    """``[B, N]`` what flows to each token: its share of ``attention`` and of ``likeness``, times its value's norm."""
    shares = attention / attention.sum(1, keepdim=True)
    if likeness is not None:
        shares = shares + likeness / likeness.sum(1, keepdim=True)
    return shares * norms


def entropy_ratios(attention: Tensor, tokens: Tensor) -> Tensor:
    """``[B]`` entropy of ``attention`` ``[B, N]`` over the ``tokens`` ``[B, N]`` (bool), as a share of the largest one."""
    shares = attention.masked_fill(~tokens, 0)
    shares = shares / shares.sum(1, keepdim=True)
    ratios: Tensor = torch.special.entr(shares).sum(1) / tokens.sum(1).clamp(min=2).log()
    return ratios


def pruned(tokens: int, target: int, left: int, ratio: float, power: float = 2.0) -> int:
    """How many of ``tokens`` go, ``target`` of which are to remain after ``left`` more blocks: all that are too many in the
    last one, before it the fewer the nearer the entropy's ``ratio`` is to 1.
    """
    most = max(tokens - target, 0)
    return min(max(round(most / left**0.5 * (1 - ratio**power)), 0), most) if left else most


def _shares(logits: Tensor, seen: Tensor) -> Tensor:
    """``[B, N]`` mean over heads of the softmax of ``logits`` ``[B, H, 1, N]`` over what is ``seen``, 0 for all else."""
    shares = logits[:, :, 0].masked_fill(~seen[:, None], torch.finfo(logits.dtype).min).softmax(-1)
    return shares.mean(1).masked_fill(~seen, 0)


@register
@dataclass(frozen=True)
class FlowCut(Tokens):
    """Prune in every second block of the encoder. Costs a host sync in each but the last, unless ``entropy`` is set."""

    name = "flowcut"
    title = "FlowCut"
    group = "in_encoder"
    paper = "arXiv 2505.19536"
    helps = "Where the encoder's own time matters and nothing may be merged: its later blocks run on fewer patches."
    needs = ("CLS attention and encoder values (all blocks)", "access behind encoder blocks")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 192
    """Tokens that are left of each grid; with ``layer``, of a sample, all of its pictures together (of LLaVA-NeXT, if the
    tiles have left as many)."""
    every: Annotated[int, AtLeast(1)] = 2
    """Patches go in each so many-th block, the last time in the one before the block that feeds the projector."""
    memory: Annotated[float, In(0, 1)] = 0.5
    """Weight of all earlier blocks in the moving average."""
    entropy: Annotated[float, In(0, 1)] | None = None
    """Ratio of the attention's entropy to the largest one, which the counts are made with: 0 prunes early, 1 in the last
    block alone; None = each picture's own, as published, which the host has to wait for."""
    power: Annotated[float, AtLeast(0)] = 2.0
    """Exponent of that ratio."""
    layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer, counted from 0, before which tokens are chosen once more, by the layer before; None = not at all,
    but 2 where tiles have borders (LLaVA-NeXT)."""
    entering: Annotated[float, AtLeast(0.1)] = 2.5
    """With ``layer``: how many times ``keep`` tokens of each grid or tile go to the language model; as published for
    LLaVA-NeXT's five tiles, 2.5 where ``keep`` is a share and 0.5 where it is a count."""

    def fitted(self, traits: Traits) -> Self:
        """Where tiles have borders, only the second stage knows how many tokens there are."""
        late = self.layer is None and BORDERS in traits.vision_sites and traits.decoder_layers > 2
        return replace(self, layer=2) if late else self

    def check(self, traits: Traits) -> str | None:
        """Needs rows of the encoder that may go, and more than one block."""
        refused = None if BORDERS in traits.vision_sites else traits.refuse_sites("encoder")
        if refused or traits.encoder_layers is None:
            return f"{refused}; use a method that acts behind the encoder, such as visionzip"
        if not traits.feature_layer:
            return "needs an encoder block in front of the one that feeds the projector, and there is none; use visionzip"
        return None if self.layer is None else traits.refuse_layers("layer", self.layer, attention=(self.layer - 1,))

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Behind each block in front of the one that feeds the projector, and before ``layer``."""
        blocks = tuple(Site("encoder", block, "after") for block in range(traits.feature_layer or 0))
        return blocks if self.layer is None else (*blocks, Site("decoder", self.layer))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention of CLS (or queries and keys) and values of these blocks; the same of the layer before ``layer``."""
        read: list[Signal] = []
        for block in range(traits.feature_layer or 0):
            site = Site("encoder", block)
            read += [Rows(site, "cls") if traits.has_cls else QueryKey(site), Values(site)]
        if self.layer is not None:
            site = Site("decoder", self.layer - 1)
            read += [Rows(site), KeyValue(site)]
        return tuple(read)

    def workspace(self, shape: Shape) -> int:
        """One row of attention and one of likeness, and the values that these are made of."""
        encoder = 2 * shape.image_attention(1) + 2 * shape.features
        return shape.edits + encoder + (2 * shape.attention(1) if self.layer is not None else 0)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Whether there is a second stage is not for it to say."""
        return {"layer": (self.layer,)}

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Add what flows in this block; in each ``every``-th one, drop."""
        if site.kind == "decoder":
            return self._second(x, layout, seen)
        targets = tuple(min(self._of_grid(items[0].count), n) for items, n in zip(layout.items, layout.visual))
        if targets == layout.visual:
            return None
        patches, block = layout.rows(*VISUAL), Site("encoder", site.layer)
        attention, flows = self._block(block, layout, patches, seen)
        earlier = state.get("prefill", FLOW)
        score = flows if earlier is None else self.memory * earlier + (1 - self.memory) * flows
        state.put("prefill", FLOW, score, rows=True)
        left = state.get("session", "traits").feature_layer - 1 - site.layer
        if left % self.every:
            return None
        ratios = [self.entropy or 0.0] * len(targets)
        if left and self.entropy is None:
            ratios = entropy_ratios(attention, patches).tolist()
        sizes = zip(layout.visual, targets, ratios)
        counts = tuple(n - pruned(n, target, left, ratio, self.power) for n, target, ratio in sizes)
        return None if counts == layout.visual else layout.keeping(top_rows(score, patches, counts), counts, "auto")

    def _of_grid(self, count: int) -> int:
        """Patches of a grid of ``count`` that leave the encoder."""
        if self.layer is None:
            return Budget(self.keep).of(count)
        more = self.keep * self.entering
        return Budget(max(int(more), 1) if isinstance(self.keep, int) else min(more, 1.0), "floor").of(count)

    def _block(self, block: Site, layout: Layout, patches: Tensor, seen: Seen) -> tuple[Tensor, Tensor]:
        """Attention and flow ``[I, N]`` of the rows of ``layout`` in a block, 0 for what is no patch."""
        values = seen[Values(block)]
        norms = value_norms(values)
        if QueryKey(block) in seen:
            query, key = seen[QueryKey(block)]
            mean = (query * patches[:, None, :, None]).sum(2, keepdim=True) / patches.sum(1)[:, None, None, None]
            attention = looked_at(mean, key, patches, key.shape[-1] ** -0.5)
            return attention, flow(attention, norms)
        attention = seen[Rows(block, "cls")].probabilities()[:, :, 0].mean(1)
        # The first column may be left out: padding, or CLS itself.
        attention = torch.nn.functional.pad(attention, (layout.shape[1] - attention.shape[1], 0)).masked_fill(~patches, 0)
        cls = (layout.role == Role.CLS).int().argmax(1)[:, None, None, None].expand(-1, values.shape[1], 1, values.shape[3])
        likeness = looked_at(values.gather(2, cls), values, layout.valid, 1.0).masked_fill(~patches, 0)
        return attention, flow(attention, norms, likeness)

    def _second(self, x: Tensor, layout: Layout, seen: Seen) -> Edit | None:
        """Choose among all visual rows of each sample, by what the last row looks at and what its value is like."""
        counts = tuple(min(Budget(self.keep).of(n), alive) for n, alive in zip(layout.originals, layout.visual))
        if counts == layout.visual:
            return None
        site, visual = Site("decoder", (self.layer or 1) - 1), layout.rows(*VISUAL)
        _, values = seen[KeyValue(site)]
        last = layout.last[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
        attention = _shares(seen[Rows(site)].logits[:, :, -1:], visual)
        likeness = looked_at(values.gather(2, last), values, visual, values.shape[3] ** -0.5)
        score = flow(attention, value_norms(values), likeness)
        return layout.keeping(top_rows(score, visual, counts), counts, "auto")
