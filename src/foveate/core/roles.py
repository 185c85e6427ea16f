"""What the rows of a sequence are: their roles, and the grids that visual ones belong to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor


class Role(IntEnum):
    """What a row of the sequence is."""

    PAD = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3
    NEWLINE = 4
    """A learned row that ends a line of visual tokens (LLaVA-NeXT): placeholder in the prompt, but no visual token."""
    CLS = 5
    """Summary rows of an encoder, before the first patch; at vision sites only."""
    ANSWER = 6
    """Text behind the prompt: an answer that is given to be learned or measured, or was generated without a cache."""
    INSERTED = 7
    """A row that a method put in (`foveate.core.layout.Edit.inserted`): no visual token of the prompt's, nor any other."""
    AUDIO = 8
    """A row of sound: no text, so it asks nothing, and no visual token."""


VISUAL = (Role.IMAGE, Role.VIDEO)


@dataclass(frozen=True)
class Item:
    """One grid of visual tokens of a sample, as the language model sees it: ``rows * columns`` tokens in raster order.

    A picture, or one view of it where a family shows an overview and details; the frames of a video lie one below the other.

    Attributes:
        rows, columns: the grid.
        source: number of the grid among all that the encoder was shown.
        frames: frames of a video, one for an image.
        encoder: which encoder's tokens they are, where a family has several: those of one picture are consecutive items.
    """

    rows: int
    columns: int
    source: int
    frames: int = 1
    encoder: int = 0

    @property
    def count(self) -> int:
        """Visual tokens of the item before anything was dropped."""
        return self.rows * self.columns


def behind(rows: Tensor) -> Tensor:
    """``[..., N]`` bool: rows behind the last one of ``rows`` ``[..., N]`` (all, where there is none)."""
    return rows.flip(-1).cumsum(-1).flip(-1) == 0


def last_of(rows: Tensor, count: int) -> Tensor:
    """``[B, min(count, N)]`` the last ``count`` of ``rows`` ``[B, N]`` (bool), ascending, padded on the left with -1."""
    # A stable sort of the mask leaves the rows, in order, at the end.
    order = rows.to(torch.uint8).argsort(dim=1, stable=True)[:, max(rows.shape[1] - count, 0) :]
    return order.masked_fill(~rows.gather(1, order), -1)


def pinned(visual: Tensor, prompt: Tensor) -> tuple[int, ...]:
    """Which samples' last row of the ``prompt`` ``[B, N]`` is one of the ``visual`` ones; () = none."""
    last = (prompt * torch.arange(1, prompt.shape[1] + 1)).argmax(1, keepdim=True)
    ends = (visual & prompt).gather(1, last)[:, 0]
    return tuple(ends.int().tolist()) if bool(ends.any()) else ()


def in_order(visual: Tensor, items: Sequence[Sequence[Item]]) -> tuple[Tensor, Tensor]:
    """Item and ordinal ``[B, N]`` of visual rows that come item by item, in raster order."""
    nth = visual.long().cumsum(1) - 1
    item, ordinal = torch.full_like(nth, -1), torch.full_like(nth, -1)
    for sample, grids in enumerate(items):
        counts = torch.tensor([grid.count for grid in grids], dtype=torch.long)
        if len(counts):
            where = visual[sample]
            item[sample, where] = torch.arange(len(counts)).repeat_interleave(counts)
            ordinal[sample, where] = nth[sample, where] - (counts.cumsum(0) - counts)[item[sample, where]]
    return item, ordinal
