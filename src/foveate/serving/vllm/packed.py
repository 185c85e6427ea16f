"""What towers share that take all pictures as one sequence of patches: Qwen's, with M-RoPE behind them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.models.qwen_vision import grids
from foveate.serving.vllm.encoding import Bound, Tower
from foveate.serving.vllm.mrope import PlacingModel


def frames(bound: Bound, layer: int) -> list[int]:
    """Rows that attend to each other where every block attends within frames."""
    return [h * w for t, h, w in grids(bound).tolist() for _ in range(t)]


class PackedModel(PlacingModel):
    """Beside vLLM's model of a family with such a tower."""

    def packed(
        self,
        first: nn.Module,
        segments: Callable[[Bound, int], list[int]] = frames,
        order: Callable[[Bound, int], Tensor | None] = lambda bound, layer: None,
    ) -> Tower:
        """The tower, given the part of its merger that is fed the features, and how rows lie in its blocks."""
        visual: Any = self.visual  # type: ignore[attr-defined]
        return Tower(
            blocks=visual.blocks,
            attention=[block.attn.attn for block in visual.blocks],
            feature_layer=len(visual.blocks) - 1,
            prefix=0,
            projector=visual.merger,
            packed=True,
            order=order,
            sites=frozenset({"patches"}),
            hidden=self.config.vision_config.hidden_size,  # type: ignore[attr-defined]
            first=first,
            segments=segments,
        )

    def share(self, bound: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
        """Patches by grid: those of all pictures lie one behind the other."""
        grid, pixels = bound["image_grid_thw"], bound["pixel_values"]
        parts = pixels.split(grid.prod(-1).tolist())
        return {"pixel_values": torch.cat([parts[number] for number in chosen]), "image_grid_thw": grid[list(chosen)]}
