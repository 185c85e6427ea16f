"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from vllm.model_executor.models import llava
from vllm.multimodal import MULTIMODAL_REGISTRY

from foveate.core.errors import FoveateError
from foveate.models.llava_next import side
from foveate.reference.published import published
from foveate.serving.vllm.encoding import Tower
from foveate.serving.vllm.families import FAMILIES
from foveate.serving.vllm.model import PruningModel
from foveate.serving.vllm.processor import PruningInfo, PruningProcessor


def tower(model: Any, family: str, config: Any) -> Tower:
    """The parts of a CLIP or SigLIP tower."""
    known, blocks = FAMILIES[family], model.vision_tower.vision_model.encoder.layers
    return Tower(
        blocks=blocks,
        attention=[block.self_attn.attn for block in blocks],
        feature_layer=len(blocks) - 1,
        prefix=int(config.vision_feature_select_strategy == "default"),
        projector=model.multi_modal_projector,
        tile=side(config) ** 2,
        sites=known.sites,
        hidden=config.vision_config.hidden_size,
        output=model.vision_tower,
    )


def respelled(weights: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
    """Weights under the names that vLLM knows: some versions of transformers save a tower's one level higher."""
    return ((published(name), weight) for name, weight in weights)


class Info(PruningInfo, llava.LlavaProcessingInfo):
    """LLaVA's, with a recipe."""

    family = "llava"


class Processor(PruningProcessor, llava.LlavaMultiModalProcessor):
    """LLaVA's, with a recipe."""


def info(ctx: Any) -> Any:
    """What knows of sizes: vLLM's own for Pixtral, which shares the architecture's name."""
    own = llava._build_llava_or_pixtral_hf_info(ctx)
    if isinstance(own, llava.LlavaProcessingInfo):
        return Info(ctx)
    if getattr(ctx.get_hf_config(), "foveate", None) is not None:
        raise FoveateError("foveate: no recipe runs on Pixtral's tower; serve it without one")
    return own


def processor(known: Any, dummies: Any) -> Any:
    """What makes prompts, by what `info` made."""
    ours = isinstance(known, Info)
    return Processor(known, dummies) if ours else llava._build_llava_or_pixtral_hf_processor(known, dummies)


@MULTIMODAL_REGISTRY.register_processor(processor, info=info, dummy_inputs=llava.LlavaDummyInputsBuilder)
class LlavaForConditionalGeneration(PruningModel, llava.LlavaForConditionalGeneration):
    """LLaVA, with a recipe."""

    family = "llava"

    def tower(self, config: Any) -> Tower:
        """CLIP's or SigLIP's."""
        return tower(self, self.family, config)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Whatever a tower's weights are called."""
        nested = hasattr(self.vision_tower, "vision_model")
        return super().load_weights(respelled(weights) if nested else weights)  # type: ignore[no-any-return]
