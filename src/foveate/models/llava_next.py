"""LLaVA-NeXT: an overview and the details of each picture, cut into tiles, with a learned row at each line's end.

The tiles' features are put together, the borders that padded the picture are cut off, and line ends are added behind the
projector. Every token is one cell of the encoder; the cells of the borders are no token.

Methods that merge rows, or promise numbers of them, act behind the projector only: before it the cells of the borders would
take part in merges and budgets, and what was merged into one of them would be cut off with it. Rows of tiles may be dropped
in the encoder by methods that know (``tiles``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from foveate.models.anatomy import Anatomy, Picture, View
from foveate.models.decoder import layers_of
from foveate.models.llava import encoder

Tiles = tuple[int, int] | None
"""Rows and columns of the tiles that show a picture's details; None where there is only the overview."""

LINE_END = torch.full((3,), -1.0, dtype=torch.float64)


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``LlavaNextForConditionalGeneration``."""
    config, inner = model.config, model.model
    return Anatomy(
        family="llava_next",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=layers_of(inner.language_model),
        image_tokens=(config.image_token_id,),
        pictures=pictures(config, inner.pack_image_features),
        encoder=encoder(config, inner, frozenset({"tiles"})),
        config=config.text_config,
    )


def pictures(config: Any, pack: Callable[..., Any]) -> Callable[[Mapping[str, Any]], list[Picture]]:
    """`Anatomy.pictures` of a model that packs features by its method ``pack``."""

    def found(bound: Mapping[str, Any]) -> list[Picture]:
        sizes = torch.as_tensor(bound["image_sizes"]).tolist()

        def packed(features: list[Tensor]) -> list[Tensor]:
            rows: list[Tensor] = pack(features, sizes, config.vision_feature_select_strategy, image_newline=LINE_END)[0]
            return rows

        return laid_out(packed, [tiles(config, size) for size in sizes], side(config))

    return found


def side(config: Any) -> int:
    """Patches in a row of a tile."""
    return int(config.vision_config.image_size // config.vision_config.patch_size)


def tiles(config: Any, size: Sequence[int]) -> tuple[int, int]:
    """Rows and columns of tiles of a picture of ``size`` (height, width) pixels."""
    height, width = select_best_resolution(tuple(size), config.image_grid_pinpoints)
    tile = config.vision_config.image_size
    return height // tile, width // tile


def laid_out(pack: Callable[[list[Tensor]], list[Tensor]], grids: Sequence[Tiles], side: int) -> list[Picture]:
    """What stands behind the placeholders of pictures that the model packs with ``pack``.

    The model's own packing is run on coordinates instead of features: ``(view, row, column)`` of every cell. What comes out
    says where each row comes from, and with resizing between which cells it lies.

    Args:
        pack: the model's packing of a picture's tiles ``[t, side * side, 3]`` to ``[T, 3]``, with `LINE_END` as line ends.
        grids: the tiles of each picture.
        side: patches in a row of a tile.
    """
    counts = [1 + (grid[0] * grid[1] if grid else 0) for grid in grids]
    firsts = itertools.accumulate([count * side * side for count in counts], initial=0)
    rows = pack([_coordinates(grid, side) for grid in grids])
    return [_picture(of_one, grid, side, first) for of_one, grid, first in zip(rows, grids, firsts)]


def around(coordinates: Tensor, row: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Cells of tokens at ``coordinates`` ``[count, 2]`` (row, column), numbered by ``row(y, x)``.

    ``[count, 1]`` where tokens are cells, ``[count, 4]`` where they lie between them. Bilinear resizing weighs the four by
    distance; here they count alike.
    """
    exact = 1e-6  # resizing rounds
    top, left = (coordinates + exact).floor().long().unbind(1)
    bottom, right = (coordinates - exact).ceil().long().unbind(1)
    cells = torch.stack([row(y, x) for y in (top, bottom) for x in (left, right)], dim=1)
    return cells[:, :1] if bool((cells == cells[:, :1]).all()) else cells


def grid_of(rows: int, columns: int) -> Tensor:
    """``[rows, columns, 2]`` row and column of each cell."""
    axes = [torch.arange(count, dtype=torch.float64) for count in (rows, columns)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1)


def _coordinates(grid: Tiles, side: int) -> Tensor:
    """``[t, side * side, 3]`` view, row and column of the cells of each tile: the overview's, then those of the details."""
    overview = torch.nn.functional.pad(grid_of(side, side), (1, 0)).reshape(1, side * side, 3)
    if grid is None:
        return overview
    rows, columns = grid
    whole = torch.nn.functional.pad(grid_of(rows * side, columns * side), (1, 0), value=1.0)
    details = whole.reshape(rows, side, columns, side, 3).transpose(1, 2).reshape(-1, side * side, 3)
    return torch.cat([overview, details])


def _picture(rows: Tensor, grid: Tiles, side: int, first: int) -> Picture:
    """One picture, from its packed coordinates ``[T, 3]`` and the encoder's row of its first cell."""
    number = rows[:, 0].round().long()

    def overview(y: Tensor, x: Tensor) -> Tensor:
        return first + y * side + x

    def details(y: Tensor, x: Tensor) -> Tensor:
        tile = 1 + y // side * (grid[1] if grid else 0) + x // side
        return first + (tile * side + y % side) * side + x % side

    views = [View(side, side, cells=around(rows[number == 0, 1:], overview))]
    ordinal = (number == 0).cumsum(0) - 1
    shown = int((number == 1).sum())
    if shown:  # of a very thin picture, less than a row or a column of cells: all details are border, and cut off
        lines = int((number < 0).sum())
        columns = shown // lines
        views.append(View(lines, columns, cells=around(rows[number == 1, 1:], details)))
        ordinal = torch.where(number == 1, (number == 1).cumsum(0) - 1, ordinal)
    tokens = torch.stack([number, ordinal], dim=1).masked_fill((number < 0)[:, None], -1)
    return Picture(tuple(views), tokens)
