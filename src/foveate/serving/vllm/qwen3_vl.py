"""Qwen3-VL in vLLM: what its decoder adds to the first layers' rows lies beside each row, and goes or stays with it."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import qwen3_vl
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.serving.vllm.encoding import Tower
from foveate.serving.vllm.packed import PackedModel
from foveate.serving.vllm.processor import PruningInfo, PruningProcessor


class Info(PruningInfo, qwen3_vl.Qwen3VLProcessingInfo):
    """Qwen3-VL's, with a recipe."""

    family = "qwen3_vl"


class Processor(PruningProcessor, qwen3_vl.Qwen3VLMultiModalProcessor):
    """Qwen3-VL's, with a recipe."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=qwen3_vl.Qwen3VLDummyInputsBuilder)
class Qwen3VLForConditionalGeneration(PackedModel, qwen3_vl.Qwen3VLForConditionalGeneration):
    """Qwen3-VL, with a recipe."""

    family = "qwen3_vl"

    def tower(self, config: Any) -> Tower:
        """Its tower: every block attends within frames."""
        return self.packed(self.visual.merger.norm)
