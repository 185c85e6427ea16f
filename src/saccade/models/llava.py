"""LLaVA-1.5: a CLIP or SigLIP encoder, an MLP projector, one square grid of tokens an image."""

from __future__ import annotations

from typing import Any

from torch import nn

from saccade.core.errors import SaccadeError
from saccade.models.anatomy import Anatomy, Encoder, square_grids


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``LlavaForConditionalGeneration``."""
    config, inner = model.config, model.model
    return Anatomy(
        family="llava",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=inner.language_model.layers,
        image_tokens=(config.image_token_id,),
        grids=square_grids(config.vision_config.image_size // config.vision_config.patch_size),
        encoder=_encoder(config, inner),
        config=config.text_config,
    )


def blocks(tower: Any) -> nn.ModuleList:
    """The blocks of a CLIP or SigLIP tower, which some versions of transformers nest one level deeper."""
    return getattr(tower, "vision_model", tower).encoder.layers


def _encoder(config: Any, inner: Any) -> Encoder:
    layers = blocks(inner.vision_tower)
    feature_layer = config.vision_feature_layer
    if not isinstance(feature_layer, int):
        raise SaccadeError(f"vision_feature_layer={feature_layer}: LLaVA with several feature layers is not supported")
    # hidden_states[0] is the embedding, so hidden_states[i] is the output of block i - 1.
    block = feature_layer - 1 if feature_layer >= 0 else len(layers) + feature_layer
    return Encoder(
        attention=[layer.self_attn for layer in layers],
        feature_layer=block,
        has_cls=config.vision_feature_select_strategy == "default",
        projector=inner.multi_modal_projector,
    )
