"""Idefics3 and SmolVLM: a prompt's tiles padded with empty ones to the longest prompt's, pixel shuffle inside the connector.

Each tile, with text around its placeholders, is a picture. The projection behind the shuffle is taken for the projector: its
rows are tokens and can go; inside the encoder a row is only a part of one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from foveate.models.anatomy import Anatomy, Encoder, Picture, squares
from foveate.models.decoder import layers_of
from foveate.models.llava import halves


def anatomy(model: Any) -> Anatomy:
    """Anatomy of an ``Idefics3ForConditionalGeneration`` or a ``SmolVLMForConditionalGeneration``."""
    config, inner = model.config, model.model
    layers = inner.vision_model.encoder.layers
    group, patch = config.scale_factor, config.vision_config.patch_size

    def pictures(bound: Mapping[str, Any]) -> list[Picture]:
        pixels: Tensor = bound["pixel_values"]
        height, width = pixels.shape[-2:]
        # The model leaves out tiles that are zero throughout; SmolVLM keeps one if all are.
        count = int((pixels != 0).flatten(2).any(2).sum())
        if config.model_type == "smolvlm":
            count = max(count, 1)
        # The model takes every tile for a square.
        return squares(count, math.isqrt((height // patch) * (width // patch)) // group, group)

    return Anatomy(
        family=config.model_type,
        model=model,
        multimodal=inner,
        vision=inner.vision_model,
        language_model=inner.text_model,
        layers=layers_of(inner.text_model),
        image_tokens=(config.image_token_id,),
        pictures=pictures,
        encoder=Encoder(
            blocks=layers,
            attention=[layer.self_attn for layer in layers],
            feature_layer=len(layers) - 1,
            prefix=0,
            projector=inner.connector.modality_projection,
            shuffled=True,
            sites=frozenset({"pre_projector"}),
            halves=halves,
        ),
        config=config.text_config,
    )
