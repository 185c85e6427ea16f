"""Gemma 3: SigLIP pooled to a fixed number of tokens, sliding and full layers with a rotary table each.

Images attend within themselves in both directions. Encoder signals are not offered: the encoder's patches are average-pooled
before the language model sees them.
"""

from __future__ import annotations

import math
from typing import Any

from saccade.models.anatomy import Anatomy, square_grids


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Gemma3ForConditionalGeneration``."""
    config, inner = model.config, model.model
    return Anatomy(
        family="gemma3",
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=inner.language_model.layers,
        image_tokens=(config.image_token_id,),
        grids=square_grids(math.isqrt(config.mm_tokens_per_image)),
        typed_rotary=True,
        config=config.text_config,
    )
