"""Rows that are merged into one: the mean of all that join it."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.reduction import Reduction


def means(owner: Tensor, place: Tensor, live: tuple[int, ...]) -> Reduction:
    """The mean of the rows of each owner.

    Args:
        owner: ``[B, N]`` the row that each row is merged into (itself, if it stays), -1 = padding.
        place: ``[B, N]`` rows that stay are handed on in the order of their places; -1 for all others.
        live: rows that stay in each sample.
    """
    rows, width = owner.shape[1], max(live)
    order = place.argsort(dim=1, stable=True)
    anchor = order[:, rows - width :]
    slot = order.argsort(dim=1) - (rows - width)
    there, mine = owner >= 0, owner.clamp(min=0)
    size = torch.zeros_like(place).scatter_add(1, mine, there.long()).gather(1, mine)
    return Reduction.merging(
        assignment=slot.gather(1, mine).masked_fill(~there, -1),
        weight=1 / size.clamp(min=1).float(),
        anchor=anchor.masked_fill(place.gather(1, anchor) < 0, -1),
    )
