"""VLM-Pruner: from a few pivots outwards, tokens unlike what is kept, near ones first; what goes is folded into what stays.

Paper: "VLM-Pruner: Buffering for Spatial Sparsity in an Efficient VLM Centrifugal Token Pruning Paradigm", arXiv 2512.02700.
Differs from the published code: the threshold is relaxed until the budget is met, with whatever is left least alike at the
end (the code gives up at the first round in which nothing is below it; ``gives_up=True`` does so, too, and may leave fewer),
and tokens that are opposite to all that stay are not folded in. Reconstructed: all pictures of a prompt are one pool, but
distances are measured within one (a token of a picture of which nothing is kept is as far as can be); the frames of a video
are one tall picture.

Whether the budget is met has to come to the host once a round, nine times at most by default.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget, Rounding
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.ranking import about, ranked
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import KeyValue, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.farthest import farthest_first


def screened(states: Tensor, valid: Tensor, count: int) -> Tensor:
    """``states`` ``[B, V, D]`` in the ``count`` channels that vary most over ``valid`` ``[B, V]`` tokens, at length 1."""
    states, there = states.float(), valid[..., None]
    total = valid.sum(1).clamp(min=1)[:, None, None]
    mean = (states * there).sum(1, keepdim=True) / total
    varies = ((states - mean).square() * there).sum(1)
    channels = varies.argsort(dim=1, descending=True, stable=True)[:, :count]
    return torch.nn.functional.normalize(states.gather(2, channels[:, None].expand(-1, states.shape[1], -1)), dim=2)


@torch.no_grad()
def outwards(
    unit: Tensor,
    places: Tensor,
    item: Tensor,
    pivots: Tensor,
    targets: Sequence[int],
    *,
    distance: float = 0.5,
    tau: float = 0.8,
    step: float = 0.1,
    batch: int = 16,
    gives_up: bool = False,
) -> Tensor:
    """Accepts, round by round, tokens that are less like what is kept than a threshold that rises.

    A token is as alike as its largest cosine to a kept one, times 1 plus ``distance`` times the way to the nearest kept one.
    Steps follow each other, samples run side by side; ``V`` floats a token of the ``batch`` are held.

    Args:
        unit: ``[B, V, q]`` tokens of length 1.
        places: ``[B, V, 2]`` their cells, in units of the grid's diagonal.
        item: ``[B, V]`` number of their grid, -1 = padding.
        pivots: ``[B, p]`` tokens that are kept whatever they are like, as many as the target allows.
        targets: tokens to keep of each sample.
        distance: how much farther tokens count as more alike.
        tau, step: first threshold, and its rise from round to round.
        batch: tokens, those least alike first, that are held against the same kept ones.
        gives_up: whether a sample's first round without any token is its last.

    Returns:
        ``[B, V]`` bool.
    """
    goal, tokens = upload(tuple(targets), unit.device)[:, None], unit.shape[1]
    kept = torch.zeros_like(item, dtype=torch.bool)
    alike, way = torch.full_like(places[..., 0], float("-inf")), torch.ones_like(places[..., 0])

    def take(some: Tensor, accepted: Tensor) -> None:
        nonlocal kept, alike, way
        spare = torch.cat([kept, kept[:, :1]], dim=1)
        kept = spare.scatter(1, some.masked_fill(~accepted, tokens), True)[:, :tokens]
        out, index = ~accepted[..., None], some[..., None]
        cosine = unit.gather(1, index.expand(-1, -1, unit.shape[2])) @ unit.mT
        alike = alike.maximum(cosine.masked_fill_(out, float("-inf")).amax(1))
        # By products, short ways would be rounded away.
        ways = torch.cdist(places.gather(1, index.expand(-1, -1, 2)), places, compute_mode="donot_use_mm_for_euclid_dist")
        way = way.minimum(ways.masked_fill_(out | (item.gather(1, some)[..., None] != item[:, None]), 1).amin(1))

    take(pivots, torch.arange(pivots.shape[1], device=unit.device) < goal)
    most = max(0, math.ceil((1 + distance - tau) / step)) + 1
    going = kept.sum(1, keepdim=True) < goal
    for number in range(most + 1):
        # Nothing is more alike than the last threshold but one.
        threshold = tau + step * number if number < most else float("inf")
        before, free = kept.sum(1, keepdim=True), ~kept & (item >= 0)
        least = (alike * (1 + distance * way)).masked_fill(~free, float("inf"))
        order, goes_on = (ranked(-least) if number == 0 else -least).argsort(dim=1, descending=True, stable=True), going
        for start in range(0, tokens, batch):
            some = order[:, start : start + batch]
            now, best = (alike * (1 + distance * way)).gather(1, some).sort(dim=1, stable=True)
            some = some.gather(1, best)
            below = free.gather(1, some) & goes_on & (now < threshold)
            accepted = below & (below.cumsum(1) <= goal - kept.sum(1, keepdim=True))
            take(some, accepted)
            if start == 0:
                goes_on = goes_on & accepted.any(1, keepdim=True)
        going = going & (kept.sum(1, keepdim=True) < goal)
        if gives_up:
            going = going & (kept.sum(1, keepdim=True) > before)
        if not bool(going.any()):
            break
    return kept


def folded(unit: Tensor, kept: Tensor, valid: Tensor, counts: Sequence[int], blend: float) -> tuple[Tensor, Tensor]:
    """What becomes of each token: the kept one that it is in the end, or that it is folded into, and its weight there.

    Args:
        unit: ``[B, V, q]`` tokens of length 1.
        kept, valid: ``[B, V]`` bool.
        counts: kept tokens of each sample.
        blend: what a kept token keeps of itself, if anything is folded into it.

    Returns:
        ``[B, V]`` each.
    """
    mine = last_of(kept, max(counts))
    cosine = unit.gather(1, mine.clamp(min=0)[..., None].expand(-1, -1, unit.shape[2])) @ unit.mT
    best, joins = cosine.masked_fill(mine[..., None] < 0, float("-inf")).max(1)
    weight = best.clamp(min=0) * (valid & ~kept)
    total = torch.zeros_like(mine, dtype=weight.dtype).scatter_add(1, joins, weight)
    weight = (1 - blend) * weight / total.clamp(min=1e-8).gather(1, joins)
    goes, number = mine.clamp(min=0).gather(1, joins), torch.arange(unit.shape[1], device=unit.device)
    full = torch.zeros_like(best).scatter_add(1, mine.clamp(min=0), total * (mine >= 0))
    own = torch.where(full > 0, blend, 1.0)
    return torch.where(kept, number, goes), torch.where(kept, own, weight)


@register
@dataclass(frozen=True)
class VLMPruner(Tokens):
    """Keep tokens unlike each other, near ones first, and fold the others in, before decoder layer ``layer``."""

    name = "vlm_pruner"
    title = "VLM-Pruner"
    group = "in_llm"
    paper = "arXiv 2512.02700"
    helps = "Small things in large pictures: around what stands out more is kept, and no attention and no question is read."
    needs = ("decoder keys and hidden states (1 layer)",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    layer: Annotated[int, AtLeast(1)] = 2
    """Decoder layer before which tokens are dropped, counted from 0."""
    keep: Annotated[int | float, Keep()] = 0.222
    """Visual tokens that are left of a sample, all of its pictures together."""
    pivots: Annotated[int, AtLeast(1)] = 4
    """Tokens to begin with, whose keys lie far from each other."""
    channels: Annotated[int, AtLeast(1)] = 256
    """Channels of the hidden states that are compared, those that vary most."""
    distance: Annotated[float, AtLeast(0)] = 0.5
    """How much a token at the other end of the picture counts as more alike; 0 = it does not."""
    tau: Annotated[float, In(0, 2)] = 0.8
    """Likeness below which a token is accepted in the first round."""
    step: Annotated[float, In(0.01, 1)] = 0.1
    """By how much that rises each round."""
    batch: Annotated[int, AtLeast(1)] = 16
    """Tokens that are looked at before what was accepted counts."""
    blend: Annotated[float, In(0, 1)] = 0.3
    """What a token keeps of itself where others are folded into it; 1 = they are dropped."""
    gives_up: bool = False
    """Whether to stop, as the published code does, at a round that accepts nothing: then fewer than ``keep`` may be left."""
    rounding: Rounding = "round"
    """How a share becomes a count."""

    def check(self, traits: Traits) -> str | None:
        """The layer must exist, and have keys before it."""
        return traits.refuse_layers("layer", self.layer, attention=(self.layer - 1,))

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of layer ``layer``."""
        return (Site("decoder", self.layer),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Keys of the layer before."""
        return (KeyValue(Site("decoder", self.layer - 1)),)

    def workspace(self, shape: Shape) -> int:
        """Keys and hidden states as float32, what is least alike, and likeness of all to those that stay."""
        states = 4 * shape.floats(shape.hidden) + 3 * shape.floats(shape.keys)
        return shape.edits + states + 2 * shape.pairs + 24 * shape.ids

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Walk over the visual tokens of each sample; fold back what is dropped."""
        budget = Budget(self.keep, self.rounding)
        counts = tuple(min(budget.of(total), there) for total, there in zip(layout.originals, layout.visual))
        if counts == layout.visual:
            return None
        rows = last_of(layout.rows(*VISUAL), max(layout.visual))
        valid, index = rows >= 0, rows.clamp(min=0)
        (keys, _), sample = seen[KeyValue(Site("decoder", self.layer - 1))], torch.arange(len(x), device=x.device)
        keys = keys.transpose(1, 2).flatten(2)[sample[:, None], index].float()
        first = keys.abs().sum(2).masked_fill(~valid, -1).argmax(1)
        pivots = farthest_first(keys, min(self.pivots, rows.shape[1]), first, metric="euclidean", valid=valid)
        unit = screened(x[sample[:, None], index], valid, self.channels)
        with about(sample, index, layout.shape):
            kept = outwards(
                unit,
                _places(layout).gather(1, index[..., None].expand(-1, -1, 2)),
                layout.item.gather(1, index).masked_fill(~valid, -1),
                pivots,
                counts,
                distance=self.distance,
                tau=self.tau,
                step=self.step,
                batch=self.batch,
                gives_up=self.gives_up,
            )
        if self.gives_up:
            counts = tuple(kept.sum(1).tolist())
        chosen = _spread(kept, rows, torch.zeros_like(layout.valid))
        if any(layout.pinned):
            chosen, counts = layout.with_predicting(chosen, counts)
        edit = layout.keeping(chosen, counts)
        if self.blend == 1 or not any(counts):
            return edit
        goes, weight = folded(unit, chosen.gather(1, index) & valid, valid, counts, self.blend)
        return replace(edit, reduction=_folding(edit, goes, weight, rows, layout))


def _folding(edit: Edit, goes: Tensor, weight: Tensor, rows: Tensor, layout: Layout) -> Reduction:
    """The rows of ``edit``, with what `folded` says of the visual ``rows`` ``[B, V]``; all others stay as they are."""
    anchor, total = edit.reduction.anchor, layout.shape[1]
    number = torch.arange(total, device=rows.device).expand(layout.shape)
    slots = torch.arange(anchor.shape[1], device=rows.device).expand_as(anchor)
    slot = _spread(slots, anchor, torch.full_like(number, -1))
    to = _spread(rows.clamp(min=0).gather(1, goes), rows, number)
    share = _spread(weight, rows, torch.ones(layout.shape, device=rows.device))
    return Reduction.merging(slot.gather(1, to), share, anchor)


def _spread(values: Tensor, rows: Tensor, into: Tensor) -> Tensor:
    """``into`` ``[B, N]`` with ``values`` ``[B, V]`` in the ``rows`` ``[B, V]`` (-1 = nowhere)."""
    total = into.shape[1]
    spare = torch.cat([into, into[:, :1]], dim=1)
    return spare.scatter(1, rows.masked_fill(rows < 0, total), values.to(into.dtype))[:, :total]


def _places(layout: Layout) -> Tensor:
    """``[B, N, 2]`` cells of visual rows, in units of their grid's diagonal."""
    most = max(map(len, layout.items))
    diagonals = [
        [math.hypot(item.rows, item.columns) for item in items] + [1.0] * (most - len(items)) for items in layout.items
    ]
    diagonal = upload(diagonals, layout.item.device).gather(1, layout.item.clamp(min=0))
    return layout.yx / diagonal[..., None]
