"""CORE: all tokens of an object become one, and objects come in the order of their centroids.

Paper: "CORE: Compact Object-centric REpresentations as a New Paradigm for Token Merging in LVLMs", arXiv 2511.14072. No code
is public. Its model has a segmenter beside the vision tower; here masks of any segmenter are handed over as side data:
``masks`` ``[M, H, W]`` of each picture, probabilities or bool (of a video's frames one below the other). They compete for
each cell of the grid (hard masks, as in the paper's main results); what none covers is one more object. Without masks a
stand-in makes them, which is not the paper's: neighbouring cells whose features are alike form an object. Merged before the
projector, as in the paper, where a family feeds it the tokens of one picture (tile) at a time, else behind it.

Reconstructed: masks are resized bilinearly; with more objects than ``keep``, those next to each other in the order of their
centroids are joined, evenly; an object stands at the place of its cell next to the centroid, also under M-RoPE.

How many objects there are has to come to the host once for each forward, because the prompt's length depends on it; the
stand-in waits for the device a few times more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor
from torch.nn.functional import interpolate, normalize

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import In, Keep
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import Item
from foveate.core.shape import INDEX, Shape
from foveate.core.signal import Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.cluster import connected

MASKS = Side("masks", needed=False)


def competition(masks: Tensor, rows: int, columns: int) -> Tensor:
    """``[rows * columns]`` which of the ``masks`` ``[M, H, W]`` has the highest value at each cell; M where all are 0."""
    resized = interpolate(masks[None].float(), (rows, columns), mode="bilinear", align_corners=False)[0].flatten(1)
    best, winner = resized.max(0)
    return winner.masked_fill(best <= 0, len(masks))


def alike(x: Tensor, alive: Tensor, rows: int, columns: int, similarity: float) -> Tensor:
    """``[I, n]`` parts of neighbouring cells whose features ``x`` ``[I, n, D]`` have a cosine of ``similarity`` or more.

    Only cells ``alive`` ``[I, n]`` (bool) are joined.
    """
    unit = normalize(x.float(), dim=-1).reshape(len(x), rows, columns, -1)
    there = alive.reshape(len(x), rows, columns)
    right = (unit[:, :, 1:] * unit[:, :, :-1]).sum(-1) >= similarity
    down = (unit[:, 1:] * unit[:, :-1]).sum(-1) >= similarity
    return connected(right & there[:, :, 1:] & there[:, :, :-1], down & there[:, 1:] & there[:, :-1])


def merging(label: Tensor, keep: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """One token for each object; within a budget the largest objects first, and of the last of them as many cells as must.

    Args:
        label: ``[I, n]`` object of each cell, in raster order, below n + 1; -1 = no cell.
        keep: ``[I]`` tokens to keep, at most as many as there are cells; None = one for each object.

    Returns:
        ``[I, n]`` token that each cell goes to (-1 = none), ``[I, n]`` the cell that stands for each token (-1 = no token),
        tokens in the order of their centroids, and ``[I]`` how many there are.
    """
    place = torch.arange(label.shape[1], device=label.device).expand_as(label)
    alive = label >= 0
    if keep is not None:
        label = _joined(label, alive, place, keep)
    object_ = label.clamp(min=0)
    area = _sums(object_, alive.long(), label.shape[1] + 1)
    leaves = (area - 1).clamp(min=0)
    if keep is not None:
        largest = area.sort(dim=1, descending=True, stable=True).indices
        most = leaves.gather(1, largest)
        before = most.cumsum(1) - most
        spare = (alive.sum(1) - keep)[:, None]
        leaves = torch.zeros_like(area).scatter(1, largest, (spare - before).clamp(min=0).minimum(most))
    # The first cells of an object, as many as leave and one more, become one; every other stays what it is.
    grouped, order = torch.where(alive, label, label.shape[1] + 1).sort(dim=1, stable=True)
    start = torch.searchsorted(grouped, grouped)
    nth = torch.zeros_like(order).scatter(1, order, place - start)
    first = torch.zeros_like(order).scatter(1, order, order.gather(1, start))
    leader = torch.where(alive & (nth <= leaves.gather(1, object_)), first, place)

    size = _sums(leader, alive.float(), label.shape[1])
    centroid = _sums(leader, torch.where(alive, place, 0).float(), label.shape[1]) / size.clamp(min=1)
    leads = alive & (leader == place)
    token = centroid.masked_fill(~leads, float("inf")).sort(dim=1, stable=True).indices
    slot = torch.zeros_like(token).scatter(1, token, place)
    away = (place - centroid.gather(1, leader)).abs()
    least = torch.full_like(away, float("inf")).scatter_reduce(1, leader, away, "amin").gather(1, leader)
    nearest = torch.where(alive & (away == least), place, label.shape[1])
    anchor = torch.full_like(nearest, label.shape[1]).scatter_reduce(1, leader, nearest, "amin").gather(1, token)
    counts = leads.sum(1)
    return (
        slot.gather(1, leader).masked_fill(~alive, -1),
        anchor.masked_fill(place >= counts[:, None], -1),
        counts,
    )


def _joined(label: Tensor, alive: Tensor, place: Tensor, keep: Tensor) -> Tensor:
    """The objects, no more than ``keep`` of them: where there are, those with neighbouring centroids are joined evenly."""
    width, object_ = label.shape[1] + 1, label.clamp(min=0)
    area = _sums(object_, alive.float(), width)
    centroid = _sums(object_, torch.where(alive, place, 0).float(), width) / area.clamp(min=1)
    order = centroid.masked_fill(area == 0, float("inf")).sort(dim=1, stable=True).indices
    count = (area > 0).sum(1, keepdim=True)
    rank = torch.zeros_like(order).scatter(1, order, torch.arange(width, device=label.device).expand_as(order))
    joined = (rank * keep[:, None] // count.clamp(min=1)).gather(1, object_)
    return torch.where(alive & (count > keep[:, None]), joined, label)


def _sums(index: Tensor, values: Tensor, width: int) -> Tensor:
    return values.new_zeros(len(index), width).scatter_add(1, index, values)


@register
@dataclass(frozen=True)
class CORE(Tokens):
    """The mean of each object's tokens; masks are side data, or made of what is alike."""

    name = "core"
    title = "CORE"
    group = "before_llm"
    paper = "arXiv 2511.14072"
    helps = "Pictures of few objects, of which somebody has masks: the fewest tokens, one for each object."
    trained = "the model of its paper learned to read one token for each object"
    needs = ("side data: masks (optional)",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] | None = None
    """Tokens that are left of each grid (a picture, or one tile or view of it); None = one for each object."""
    similarity: Annotated[float, In(-1, 1)] = 0.8
    """Cosine from which on neighbouring cells belong to one object, where no masks are handed over; our choice."""

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the projector, where that is open."""
        return (Site("pre_projector" if "pre_projector" in traits.vision_sites else "projected"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The masks, if there are any."""
        return (MASKS,)

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, as given and by grid, and numbers of cells and objects."""
        rows = max(shape.floats(shape.features), shape.floats(shape.hidden))
        return shape.edits + 6 * rows + 48 * INDEX * (shape.images * shape.image_rows + shape.samples * shape.visual)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Objects of each picture, merged."""
        budget = None if self.keep is None else Budget(self.keep)
        there = [(items[0].count, alive) for items, alive in zip(layout.items, layout.visual)]
        kept = [alive if budget is None else min(budget.of(count), alive) for count, alive in there]
        if budget is not None and tuple(kept) == layout.visual:
            return None
        masks = seen[MASKS].of([(row, 0) for row in range(len(x))]) if MASKS in seen else [None] * len(x)
        item, cells = layout.items[0][0], layout.items[0][0].count  # rows of one batch are of one grid
        # On full grids, so that neighbours are found whatever was dropped or moved before.
        cell = layout.ordinal.masked_fill(layout.ordinal < 0, cells)
        place = torch.arange(x.shape[1], device=x.device).expand_as(cell)
        row = torch.full((len(x), cells + 1), -1, device=x.device).scatter(1, cell, place)[:, :cells]
        features = x.gather(1, row.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        label = self._objects(features, row >= 0, item, masks)
        target, anchor, found = merging(label, None if budget is None else upload(kept, x.device))
        # How many objects there are is known on the device alone: the one wait, without a budget.
        counts = tuple(found.tolist()) if budget is None else tuple(kept)
        stands = torch.where(anchor >= 0, row.gather(1, anchor.clamp(min=0)), -1)[:, : max(counts)]
        goes = torch.cat([target, torch.full_like(target[:, :1], -1)], dim=1).gather(1, cell)
        size = _sums(goes.clamp(min=0), (goes >= 0).float(), x.shape[1])
        weight = 1 / size.gather(1, goes.clamp(min=0)).clamp(min=1)
        return Edit(Reduction.merging(goes, weight, stands), positions="auto", live=counts, visual=counts)

    def _objects(self, x: Tensor, alive: Tensor, item: Item, masks: Sequence[Tensor | None]) -> Tensor:
        """``[I, n]`` object of each cell, -1 where none is alive."""
        if all(given is not None for given in masks):
            label = torch.stack([self._given(given, item) for given in masks if given is not None])
        else:
            label = alike(x, alive, item.rows, item.columns, self.similarity)
            for image, given in enumerate(masks):
                if given is not None:
                    label[image] = self._given(given, item)
        return label.masked_fill(~alive, -1)

    def _given(self, masks: Tensor, item: Item) -> Tensor:
        if not isinstance(masks, Tensor) or masks.ndim != 3 or not len(masks):
            shape = tuple(masks.shape) if isinstance(masks, Tensor) else type(masks).__name__
            raise FoveateError(f"core: masks={shape}: must be a tensor [masks, height, width] of each picture")
        # There may be more masks than cells: those that win any are counted through.
        ordered, order = competition(masks, item.rows, item.columns).sort(stable=True)
        number = (ordered.diff(prepend=ordered[:1]) != 0).long().cumsum(0)
        return torch.zeros_like(number).scatter(0, order, number)
