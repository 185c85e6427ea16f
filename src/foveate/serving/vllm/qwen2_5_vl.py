"""Qwen2.5-VL in vLLM: most blocks of the tower attend within windows, and all work on rows in window order."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.models import qwen2_5_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.models.qwen_vision import grids, rows_of
from foveate.serving.vllm.encoding import Bound, Tower
from foveate.serving.vllm.packed import PackedModel
from foveate.serving.vllm.processor import PruningInfo, PruningProcessor


class Info(PruningInfo, qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    """Qwen2.5-VL's, with a recipe."""

    family = "qwen2_5_vl"


class Processor(PruningProcessor, qwen2_5_vl.Qwen2_5_VLMultiModalProcessor):
    """Qwen2.5-VL's, with a recipe."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder)
class Qwen2_5_VLForConditionalGeneration(PackedModel, qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL, with a recipe."""

    family = "qwen2_5_vl"

    def tower(self, config: Any) -> Tower:
        """Its tower, by windows."""
        visual, vision = self.visual, config.vision_config
        unit = vision.spatial_merge_size**2

        @lru_cache(maxsize=256)
        def windows(t: int, h: int, w: int) -> tuple[Tensor, list[int]]:
            """Tokens of a grid in window order, and how many patches are in each window."""
            index, ends = visual.get_window_index_thw(t, h, w)
            return index, torch.cat([ends[:1], ends.diff()]).tolist()

        def order(bound: Bound, layer: int) -> Tensor:
            first, rows = 0, []
            for grid in grids(bound).tolist():
                index, _ = windows(*grid)
                rows.append(index + first)
                first += len(index)
            return rows_of(torch.cat(rows), unit)

        def segments(bound: Bound, layer: int) -> list[int]:
            whole = layer in vision.fullatt_block_indexes
            return [
                length
                for t, h, w in grids(bound).tolist()
                for length in ([h * w] * t if whole else windows(t, h, w)[1])
                if length
            ]

        return self.packed(visual.merger.ln_q, segments, order)
