"""Qwen3-VL in vLLM: what its decoder adds to the first layers' rows lies beside each row, and goes or stays with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.models.qwen_vision import grids
from foveate.serving.vllm.encoding import Bound, Tower
from foveate.serving.vllm.mrope import PlacingModel
from foveate.serving.vllm.processor import PruningInfo, PruningProcessor
from foveate.serving.vllm.qwen2_5_vl import share


class Info(PruningInfo, qwen3_vl.Qwen3VLProcessingInfo):
    """Qwen3-VL's, with a recipe."""

    family = "qwen3_vl"


class Processor(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's, with a recipe."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder)
class Qwen3VLForConditionalGeneration(PlacingModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, with a recipe."""

    family = "qwen3_vl"

    def tower(self, config: Any) -> Tower:
        """Its tower: every block attends within frames."""
        visual, vision = self.visual, config.vision_config

        def segments(bound: Bound, layer: int) -> list[int]:
            return [h * w for t, h, w in grids(bound).tolist() for _ in range(t)]

        return Tower(
            blocks=visual.blocks,
            attention=[block.attn.attn for block in visual.blocks],
            feature_layer=len(visual.blocks) - 1,
            prefix=0,
            projector=visual.merger,
            packed=True,
            sites=frozenset({"patches"}),
            hidden=vision.hidden_size,
            first=visual.merger.norm,
            segments=segments,
        )

    def share(self, bound: Mapping[str, Any], chosen: Sequence[int]) -> dict[str, Any]:
        """Patches by grid."""
        return share(bound, chosen)
