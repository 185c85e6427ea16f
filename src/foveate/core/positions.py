"""Rotary positions of the rows that go on when others leave."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.core.reduction import Reduction

Positions = Literal["auto", "anchor", "contiguous", "rank"]
TextAfter = Literal["keep", "follow"]


def renumbered(
    positions: Tensor,
    reduction: Reduction,
    policy: Positions,
    text_after: TextAfter,
    *,
    item: Tensor,
    items: int,
    valid: Tensor,
    alive: Tensor,
) -> Tensor:
    """Positions ``[R, B, k]`` of the rows that go on; see `foveate.core.layout.Edit` for ``policy`` and ``text_after``.

    Args:
        positions: ``[R, B, N]`` before the edit.
        reduction: what becomes of the rows.
        policy: how they are numbered.
        text_after: what text behind an item does, with ``"anchor"``.
        item: ``[B, N]`` number of each row's item before the edit, -1 where none.
        items: most items of a sample.
        valid: ``[B, N]`` bool: rows before the edit that are no padding.
        alive: ``[B, k]`` bool: the same for rows that go on.
    """
    if policy == "auto":
        policy = "contiguous" if positions.shape[0] == 1 else "anchor"
    if policy == "contiguous":
        rank = (alive.long().cumsum(1) - 1).clamp(min=0)
        return (_smallest(positions, valid) + rank).masked_fill(~alive, 0)
    kept = torch.stack([reduction.take(row) for row in positions])
    if not items or (policy == "anchor" and text_after == "keep"):
        return kept
    number = reduction.take(item).masked_fill(~alive, -1)
    of_item = torch.stack([number == j for j in range(items)])[:, None]  # [J, 1, B, k]
    if policy == "rank":
        rises = _ranks(torch.where(of_item, kept, torch.iinfo(kept.dtype).max))
    else:
        rises = kept - torch.stack([_smallest(positions, item == j) for j in range(items)])  # [J, R, B, k]
    inside, outside = _following(rises, of_item, alive & (number < 0))
    return (_smallest(positions, valid) + torch.where(number >= 0, inside, outside)).masked_fill(~alive, 0)


def _following(rises: Tensor, of_item: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Positions, from 0, of rows inside items and of text, which follows the largest of the items before it.

    Args:
        rises: ``[J, R, B, k]`` by how much a row of item j is above the item's start.
        of_item: ``[J, 1, B, k]`` bool: rows of the item.
        text: ``[B, k]`` bool: rows of none.

    Returns:
        ``[R, B, k]`` each.
    """
    # A fourth row in front numbers all tokens; how much room an item takes is said by the others.
    axes = slice(1, None) if rises.shape[1] == 4 else slice(None)
    extent = torch.where(of_item, rises + 1, 0)[:, axes].amax(dim=(1, 3))  # [J, B]
    offset = extent.cumsum(0) - extent  # positions that earlier items take
    before = (text.long().cumsum(1) - text.long())[None]  # [1, B, k] text rows before each row
    begin = torch.where(of_item, before, torch.iinfo(before.dtype).max).amin(dim=3, keepdim=True)  # [J, 1, B, 1]
    # What an item without rows begins at is never read.
    inside = torch.where(of_item, rises + begin + offset[:, None, :, None], 0).sum(0)
    seen = of_item[:, 0].long().cumsum(2)
    passed = (seen == seen[..., -1:]) & (seen > 0)
    outside = before + torch.where(passed, extent[:, :, None], 0).sum(0)
    return inside, outside.expand_as(inside)


def _ranks(places: Tensor) -> Tensor:
    """The rank of each position ``[..., k]`` among the different ones."""
    ordered, order = places.sort(dim=-1)
    rises = (ordered.diff(prepend=ordered[..., :1]) != 0).long().cumsum(-1)
    return torch.zeros_like(ordered).scatter(-1, order, rises)


def _smallest(positions: Tensor, rows: Tensor) -> Tensor:
    """``[R, B, 1]`` smallest position of the ``rows`` ``[B, N]`` of each sample."""
    return positions.masked_fill(~rows, torch.iinfo(positions.dtype).max).amin(dim=2, keepdim=True)
