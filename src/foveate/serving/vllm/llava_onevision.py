"""LLaVA-OneVision in vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava_onevision
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.serving.vllm.encoding import Tower
from foveate.serving.vllm.llava import respelled, tower
from foveate.serving.vllm.model import PruningModel
from foveate.serving.vllm.processor import PruningInfo, PruningProcessor


class Info(PruningInfo, llava_onevision.LlavaOnevisionProcessingInfo):
    """LLaVA-OneVision's, with a recipe."""

    family = "llava_onevision"


class Processor(PruningProcessor, llava_onevision.LlavaOnevisionMultiModalProcessor):
    """LLaVA-OneVision's, with a recipe."""


@MULTIMODAL_REGISTRY.register_processor(Processor, info=Info, dummy_inputs=llava_onevision.LlavaOnevisionDummyInputsBuilder)
class LlavaOnevisionForConditionalGeneration(PruningModel, llava_onevision.LlavaOnevisionForConditionalGeneration):
    """LLaVA-OneVision, with a recipe."""

    family = "llava_onevision"

    def tower(self, config: Any) -> Tower:
        """SigLIP's."""
        return tower(self, self.family, config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Whatever a tower's weights are called."""
        return super().load_weights(respelled(weights))  # type: ignore[no-any-return]
