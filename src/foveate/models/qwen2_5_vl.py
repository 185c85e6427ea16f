"""Qwen2.5-VL: like Qwen2-VL, but most blocks of the encoder attend within windows.

The tower sorts its cells by window in front of the first block and puts the *tokens* back behind the merger. So every block,
those with full attention too, the merger's input (by patch) and the merger's output (by token) are in window order
(`Encoder.order`); only what the tower returns is in raster order. The attention function is called once for each window, or
for each frame in blocks with full attention, in the order of the rows; a frame is a whole number of windows. Encoding only
some cells leaves out rows and keeps the order of the others: their order is the full one without the cells that are gone.

What is common to the Qwen families is in `foveate.models.qwen_vision`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from transformers.vision_utils import get_vision_window_index

from foveate.models.anatomy import Anatomy
from foveate.models.qwen_vision import boundaries, grids, packed, qwen, rows_of


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen2_5_VLForConditionalGeneration``."""
    vision = model.config.vision_config
    unit = vision.spatial_merge_size**2

    def windows(grid: Tensor, call: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """``[N]`` cells in window order, and the windows' boundaries."""
        return get_vision_window_index(
            grid,
            spatial_merge_size=vision.spatial_merge_size,
            window_size=vision.window_size,
            patch_size=vision.patch_size,
            kwargs=call,
        )

    def tables(grid: Tensor, call: dict[str, Any], cells: Tensor) -> dict[str, Tensor]:
        index, full = windows(grid, call)
        place = index.argsort().to(cells.device)[cells].sort()
        return {
            "window_index": place.indices,
            "cu_window_seqlens": boundaries(full.to(cells.device), place.values, unit),
        }

    def order(bound: Mapping[str, Any], layer: int) -> Tensor:
        return rows_of(windows(grids(bound), {})[0], unit)

    return qwen(model, packed(model.model.visual, tables, order))
