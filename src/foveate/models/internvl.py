"""InternVL: square tiles, 2x2 patches joined to a token in front of the projector (pixel shuffle), blocks with layer scale.

Each tile is a picture: nothing in the call tells which tiles show the same image. Inside the encoder a row is a quarter of a
token, so rows can go at the projector only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from foveate.models.anatomy import Anatomy, Encoder, Halves, Picture, Projections, squares
from foveate.models.decoder import layers_of
from foveate.models.llava import feature_block


def anatomy(model: Any) -> Anatomy:
    """Anatomy of an ``InternVLForConditionalGeneration``."""
    config, inner = model.config, model.model
    layers = inner.vision_tower.encoder.layer
    group = round(1 / config.downsample_ratio)
    rows, columns = config.vision_config.patch_size

    def pictures(bound: Mapping[str, Any]) -> list[Picture]:
        tiles, _, height, width = bound["pixel_values"].shape
        # The model takes every tile for a square.
        return squares(tiles, math.isqrt((height // rows) * (width // columns)) // group, group)

    return Anatomy(
        family="internvl",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=layers_of(inner.language_model),
        image_tokens=(config.image_token_id,),
        pictures=pictures,
        encoder=Encoder(
            blocks=layers,
            attention=[layer.attention for layer in layers],
            feature_layer=feature_block(config.vision_feature_layer, len(layers)),
            prefix=int(config.vision_feature_select_strategy == "default"),
            projector=inner.multi_modal_projector,
            shuffled=True,
            sites=frozenset({"pre_projector"}),
            halves=halves,
        ),
        config=config.text_config,
    )


def halves(block: Any) -> Halves:
    """The parts of an InternVL block."""
    attention = block.attention
    return Halves(
        block.layernorm_before,
        attention,
        block.layernorm_after,
        block.mlp,
        Projections(
            lambda x: attention.q_norm(attention.q_proj(x)),
            lambda x: attention.k_norm(attention.k_proj(x)),
            attention.v_proj,
            lambda x: attention.projection_dropout(attention.projection_layer(x)),
        ),
        scale1=block.lambda_1,
        scale2=block.lambda_2,
    )
