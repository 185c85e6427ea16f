"""DART: a few pivots with large keys, and the tokens that are least like them: duplicates go, whatever their importance.

Paper: "Stop Looking for Important Tokens in Multimodal Language Models: Duplication Matters More", arXiv 2502.11494. As the
released code, likeness is that of the hidden states behind the model's final norm. Differs from it: pivots come in the order
of their keys' L1 norm, visual ones first (there in the order of a Python set), and the budget is met exactly: too few are
filled up by the largest norm of the hidden states, of too many those with the smallest go, of equals the one chosen last.
``space="embedding"`` is the variant of TensorRT-Edge-LLM (``--visualPrune``): the embeddings that enter the language model
stand for keys and hidden states, and each grid has pivots and a budget of its own. Reconstructed: the norm that decides is
that before the final norm, which makes all nearly equal; elsewhere all pictures of a prompt are one pool, and text is what
stands behind the last of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget, Rounding
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Keep
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Role, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Function, KeyValue, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.select import first_rows, top_k

Quota = Literal["ceil", "round"]


def strongest(strength: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places ``[I, p]`` of the ``count`` strongest of ``rows`` ``[I, n]`` (-1 = padding), and which of them there are.

    ``strength`` ``[I, n]`` is that of the rows.
    """
    places = top_k(strength.masked_fill(rows < 0, float("-inf")), count)
    return places, rows.gather(1, places) >= 0


def least_like(
    states: Tensor,
    length: Tensor,
    valid: Tensor,
    own: Tensor,
    others: Tensor,
    there: Tensor,
    targets: Sequence[int],
    quota: Quota,
) -> Tensor:
    """Tokens in the order in which they are to stay: each pivot in turn takes its quota of those least like it.

    Args:
        states: ``[I, V, D]`` visual tokens, compared by cosine.
        length: ``[I, V]`` by which too few are filled up, and too many cut.
        valid: ``[I, V]`` which of them there are.
        own: ``[I, p]`` the pivots among them, the first first.
        others: ``[I, t, D]`` states of the pivots among the text.
        there: ``[I, p + t]`` which pivots there are, visual ones first.
        targets: tokens that are to stay of each.
        quota: how an equal share of the target becomes a count.

    Returns:
        ``[I, V]``: the first ``targets[i]`` stay.
    """
    tokens = states.shape[1]
    pivots = torch.cat([states.gather(1, own[..., None].expand(-1, -1, states.shape[2])), others], dim=1)
    unit = torch.nn.functional.normalize
    likeness = unit(pivots, dim=2) @ unit(states, dim=2).mT  # [I, p + t, V]
    share = upload(tuple(targets), states.device)[:, None] / there.sum(1, keepdim=True).clamp(min=1)
    share = share.ceil() if quota == "ceil" else share.round()
    # When each token was chosen: pivots first of all, those never chosen last.
    never = tokens * (pivots.shape[1] + 1)
    number = torch.arange(tokens, device=states.device)
    turn = torch.full_like(valid, never, dtype=torch.long)
    turn = turn.scatter(1, own, torch.where(there[:, : own.shape[1]], number[: own.shape[1]], never))
    for step in range(pivots.shape[1]):
        free = valid & (turn == never)
        order = likeness[:, step].masked_fill(~free, float("inf")).argsort(dim=1, stable=True)
        rank = torch.zeros_like(order).scatter(1, order, number.expand_as(order))
        takes = free & (rank < share) & there[:, step, None]
        turn = torch.where(takes, tokens * (step + 1) + rank, turn)
    order = turn.argsort(dim=1)  # no two that were chosen share a turn
    for first in (length, (turn < never).float(), valid.float()):
        order = order.gather(1, first.gather(1, order).argsort(dim=1, descending=True, stable=True))
    return order


@register
@dataclass(frozen=True)
class DART(Tokens):
    """Keep the visual tokens that are no duplicates of pivots, before decoder layer ``layer``."""

    name = "dart"
    title = "DART"
    group = "in_llm"
    paper = "arXiv 2502.11494"
    helps = "Where fused kernels are to stay and no question is to decide: keys and hidden states are read, no attention."
    needs = ("decoder keys and hidden states (1 layer), or projected tokens with space='embedding'",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    layer: Annotated[int, AtLeast(1)] = 2
    """Decoder layer before which tokens are dropped, counted from 0; not used with ``space="embedding"``."""
    keep: Annotated[int | float, Keep()] = 0.222
    """Visual tokens that are left of a sample, all of its pictures together; with ``space="embedding"``, of each grid (a
    picture, or one tile or view of it)."""
    visual_pivots: Annotated[int, AtLeast(0)] = 4
    """Visual tokens that others are compared with."""
    text_pivots: Annotated[int, AtLeast(0)] = 4
    """Text tokens behind the pictures that visual ones are compared with, where there are so many."""
    space: Literal["hidden", "embedding"] = "hidden"
    """Keys and hidden states of the layer before (``"hidden"``), or, before the language model, the embeddings alone."""
    quota: Quota = "ceil"
    """How the share of the budget that each pivot chooses becomes a count: as in the script for LLaVA, or as in others."""
    rounding: Rounding = "round"
    """How a share becomes a count."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.visual_pivots + self.text_pivots > 0, "visual_pivots", "must be 1 or more without text_pivots")

    def check(self, traits: Traits) -> str | None:
        """The layer must exist, and have keys before it."""
        if self.space == "embedding":
            return None
        return traits.refuse_layers("layer", self.layer, attention=(self.layer - 1,))

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of layer ``layer``, or of the language model."""
        return (Site("decoder", self.layer) if self.space == "hidden" else Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Keys of the layer before, and the final norm."""
        if self.space == "embedding":
            return ()
        return KeyValue(Site("decoder", self.layer - 1)), Function("norm")

    def workspace(self, shape: Shape) -> int:
        """The tokens behind the final norm, as float32 and at length 1; their likeness to the pivots, and their order."""
        likeness = (self.visual_pivots + self.text_pivots) * shape.ids
        return shape.edits + shape.keys + 4 * shape.floats(shape.hidden) + likeness + 24 * shape.ids

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt, or for each grid; the budget is a share of the tokens that it came with."""
        budget, alive = Budget(self.keep, self.rounding), layout.alive
        visual, by_item = layout.rows(*VISUAL), None
        if self.space == "embedding":
            grids = [(b, j) for b, items in enumerate(layout.items) for j in range(len(items))]
            counts = tuple(min(budget.of(layout.items[b][j].count), alive[b][j]) for b, j in grids)
            if counts == tuple(alive[b][j] for b, j in grids):
                return None
            sample, number = upload(grids, x.device).unbind(1)
            pools = last_of(visual[sample] & (layout.item[sample] == number[:, None]), max(map(max, filter(None, alive))))
            kept_of = dict(zip(grids, counts))
            by_item = tuple(tuple(kept_of[b, j] for j in range(len(items))) for b, items in enumerate(layout.items))
            states, strength = x, x.abs().sum(2, dtype=torch.float32)
        else:
            counts = tuple(min(budget.of(total), there) for total, there in zip(layout.originals, layout.visual))
            if counts == layout.visual:
                return None
            sample, pools = torch.arange(len(x), device=x.device), last_of(visual, max(layout.visual))
            keys, _ = seen[KeyValue(Site("decoder", self.layer - 1))]
            states, strength = seen[Function("norm")](x).to(x.device), keys.abs().sum((1, 3), dtype=torch.float32)
        asking = layout.question_rows
        asking = asking.masked_fill(layout.role.gather(1, asking.clamp(min=0)) != Role.TEXT, -1)[sample]

        index = pools.clamp(min=0)
        with about(sample, index, layout.shape):
            own, own_there = strongest(strength[sample[:, None], index], pools, self.visual_pivots)
        text, text_there = strongest(strength[sample[:, None], asking.clamp(min=0)], asking, self.text_pivots)
        order = least_like(
            states[sample[:, None], index].float(),
            x[sample[:, None], index].float().norm(dim=2),
            pools >= 0,
            own,
            states[sample[:, None], asking.clamp(min=0).gather(1, text)].float(),
            torch.cat([own_there, text_there], dim=1),
            counts,
            self.quota,
        )
        chosen = first_rows(order, index, counts, x.shape[1])
        kept = torch.zeros_like(visual, dtype=torch.uint8).index_add(0, sample, chosen.to(torch.uint8)).bool()
        return layout.keeping(kept, counts if by_item is None else tuple(map(sum, by_item)), by_item=by_item)
