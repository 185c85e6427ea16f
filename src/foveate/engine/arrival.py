"""What comes to the language model of pictures that were shortened before it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.engine.vision import Look


def arrival(looks: Sequence[Look], layout: Layout) -> Edit | None:
    """The edit that drops the slots that were emptied, and puts the rows into their new order; None where nothing was.

    ``looks`` are in the order in which the grids of the ``layout`` are numbered.
    """
    device = layout.origin.device
    edited = [look for look in looks if look.edited]
    if not edited:
        return None
    ranks, counts = _survivors(looks, device)
    table = pad_sequence(ranks, batch_first=True, padding_value=-1)
    sources = [torch.tensor([grid.source for grid in grids] or [0]) for grids in layout.items]
    owner = upload(pad_sequence(sources, batch_first=True), device)
    source = owner.gather(1, layout.item.clamp(min=0))
    visual = layout.ordinal >= 0
    rank = torch.where(visual, table[source, layout.ordinal.clamp(min=0)], -1)
    keep = layout.valid & (~visual | (rank >= 0))
    by_item = tuple(tuple(counts[grid.source] for grid in grids) for grids in layout.items)
    shown = tuple(map(sum, by_item))
    live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, shown))
    kept = Reduction.keeping(keep, live)
    item = kept.take(layout.item).masked_fill(~kept.valid, -1)
    anchor = kept.anchor.gather(1, _ranked(item, kept.take(rank)))
    look = edited[-1]
    return Edit(
        Reduction.gather(anchor, kept.inputs),
        positions=look.positions,
        text_after=look.text_after,
        live=live,
        visual=shown,
        by_item=by_item,
    )


def _survivors(looks: Sequence[Look], device: torch.device) -> tuple[list[Tensor], list[int]]:
    """Rank of each token and number of survivors of every grid, in the order in which the intake numbers them."""
    ranks, counts = [], []
    for look in looks:
        for left, view in zip(look.survivors, look.views):
            every = view.rows * view.columns
            ranks.append(torch.arange(every, device=device) if left.rank is None else left.rank.to(device))
            counts.append(left.count)
    return ranks, counts


def _ranked(item: Tensor, rank: Tensor) -> Tensor:
    """``[B, n]`` which row goes where, so that each item's rows stand in the order of their ``rank``; text rows stay."""
    place = torch.arange(item.shape[1], device=item.device)
    span = item.shape[1] + 1
    fixed = span * span + place  # behind every item: there are fewer items than rows
    places = torch.where(item >= 0, item * span, fixed).argsort(dim=1, stable=True)
    rows = torch.where(item >= 0, item * span + rank, fixed).argsort(dim=1, stable=True)
    return torch.empty_like(rows).scatter(1, places, rows)
