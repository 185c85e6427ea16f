"""Pool: average pooling of each picture's tokens to a smaller grid, without looking at what they show.

Paper: "Are We Using the Right Benchmark: An Evaluation Framework for Visual Token Compression Methods", arXiv 2510.07143,
which finds that plain image operations beat many published methods. Reconstructed: the paper shrinks the picture, which
families with a fixed grid do not show (`downsample`); this does the like to projected tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Annotated

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import Keep
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.roles import Item
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.means import means


def smaller_grid(rows: int, columns: int, k: int) -> tuple[int, int]:
    """Rows and columns of the largest grid of at most ``k`` cells that has the shape of the given one.

    Each side is rounded up or down, so the shape is kept to a cell; of two that are as large the one with fewer rows.
    """
    scale = min(math.sqrt(k / (rows * columns)), 1.0)
    if rows * scale < 1 or columns * scale < 1:  # a strip stays a strip
        return (1, min(columns, k)) if rows <= columns else (min(rows, k), 1)
    sides = [(math.floor(side * scale), min(math.ceil(side * scale), side)) for side in (rows, columns)]
    return max(((r, c) for r, c in product(*sides) if r * c <= k), key=lambda grid: (grid[0] * grid[1], -grid[0]))


def blocks(count: int, parts: int) -> tuple[Tensor, Tensor]:
    """For each of ``count`` cells in a line the one of ``parts`` even blocks it is in, and each block's middle cell."""
    start = torch.arange(parts + 1) * count // parts
    return torch.repeat_interleave(start.diff()), (start[:-1] + start[1:] - 1) // 2


@register
@dataclass(frozen=True)
class Pool(Tokens):
    """Average the tokens of each block of a picture's grid, so that a smaller grid is left."""

    name = "pool"
    title = "Average pooling"
    group = "before_llm"
    paper = "baseline"
    helps = "As a baseline: what a picture of fewer, larger cells is worth; where a model's grid is fixed, for downsample."
    needs = ("projected tokens",)
    identity_at = {"most": 1.0}  # noqa: RUF012
    budgeted = "most"
    needs_grid = True

    most: Annotated[int | float, Keep()] = 0.25
    """Visual tokens of each grid (a picture, or one tile or view of it; a video's frames each get their share) that may be
    left: as many as a smaller grid of its shape has, at least one.
    """
    positions: Positions = "auto"
    """Rotary positions of what stays: as if the prompt had been short (``"contiguous"``), those of the blocks' middle cells
    (``"anchor"``), as if the grid had been smaller (``"rank"``), or contiguous where positions are one row, else of the
    middle cells (``"auto"``).
    """

    def pooled(self, item: Item) -> tuple[int, int]:
        """Rows and columns that are left of each frame of a grid."""
        k = max(Budget(self.most, "floor").of(item.count) // item.frames, 1)
        return smaller_grid(item.rows // item.frames, item.columns, k)

    def check(self, traits: Traits) -> str | None:
        """Contiguous positions have no meaning under M-RoPE."""
        return traits.refuse_positions(self.positions)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Merge each block into the cell in its middle, all grids of one shape at once."""
        groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for b, items in enumerate(layout.items):
            for j, item in enumerate(items):
                groups.setdefault((item.rows, item.columns, item.frames), []).append((b, j))
        left = [[math.prod(self.pooled(item)) * item.frames for item in items] for items in layout.items]
        if all(count == item.count for counts, items in zip(left, layout.items) for count, item in zip(counts, items)):
            return None

        owner = torch.arange(x.shape[1], device=x.device).expand(layout.shape).masked_fill(~layout.valid, -1)
        place = owner.clone()
        for entries in groups.values():
            item = layout.items[entries[0][0]][entries[0][1]]
            block, middle = self._blocks(item)
            sample = upload([b for b, _ in entries], x.device)[:, None]
            where = layout.where(entries)
            where = where.gather(1, layout.ordinal[sample, where].argsort(dim=1))  # in raster order
            merged = where[:, upload(middle, x.device)]
            owner[sample, where] = merged[:, upload(block, x.device)]
            place[sample, where] = -1
            place[sample, merged] = merged
        if any(layout.pinned):
            # A prompt that ends in its picture goes on from its last row: there stands the block that it is in.
            last = layout.last
            middle, pinned = owner.gather(1, last), upload(layout.pinned, x.device).bool()[:, None]
            place = torch.where(pinned, place.scatter(1, middle, -1).scatter(1, last, last), place)
            owner = torch.where(pinned & (owner == middle), last, owner)
        visual, by_item = tuple(map(sum, left)), tuple(map(tuple, left))
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, visual))
        return Edit(means(owner, place, live), self.positions, live=live, visual=visual, by_item=by_item)

    def _blocks(self, item: Item) -> tuple[Tensor, Tensor]:
        """The block of each cell of a grid ``[n]``, and the middle cell of each block ``[k]``, in raster order."""
        height, (rows, columns) = item.rows // item.frames, self.pooled(item)
        (of_row, middle_row), (of_column, middle_column) = blocks(height, rows), blocks(item.columns, columns)
        block = of_row[:, None] * columns + of_column
        middle = middle_row[:, None] * item.columns + middle_column
        frame = torch.arange(item.frames)[:, None]
        whole, cells = (block.flatten() + frame * rows * columns), (middle.flatten() + frame * height * item.columns)
        return whole.flatten(), cells.flatten()
