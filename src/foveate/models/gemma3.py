"""Gemma 3: SigLIP pooled to a fixed number of tokens, sliding and full layers with a rotary table each.

Images attend within themselves in both directions. Patches are average-pooled to tokens in front of the projection, so
encoder signals are pooled likewise and rows can go behind the projector only.
"""

from __future__ import annotations

import math
from typing import Any

from foveate.models.anatomy import Anatomy, Encoder, square_pictures
from foveate.models.llava import blocks, halves


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Gemma3ForConditionalGeneration``."""
    config, inner = model.config, model.model
    side = math.isqrt(config.mm_tokens_per_image)
    patches = config.vision_config.image_size // config.vision_config.patch_size
    layers = blocks(inner.vision_tower)
    return Anatomy(
        family="gemma3",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=inner.language_model.layers,
        image_tokens=(config.image_token_id,),
        pictures=square_pictures(side, patches // side),
        encoder=Encoder(
            blocks=layers,
            attention=[layer.self_attn for layer in layers],
            feature_layer=len(layers) - 1,
            prefix=0,
            projector=inner.multi_modal_projector,
            pools=True,
            halves=halves,
        ),
        one_grid=True,
        config=config.text_config,
    )
