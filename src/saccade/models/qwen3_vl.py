"""Qwen3-VL: images of any size, 2x2 patch merging, M-RoPE, DeepStack features added after the first decoder layers.

Encoder signals are not offered yet: they come by patch, four to a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.models.anatomy import Anatomy, Grid


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen3VLForConditionalGeneration``."""
    config, inner = model.config, model.model
    merge = config.vision_config.spatial_merge_size

    def grids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Grid]:
        thw: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        # Frames of a video lie one below the other in a single grid.
        return [(t * h // merge, w // merge) for t, h, w in thw.tolist()]

    return Anatomy(
        family="qwen3_vl",
        model=model,
        multimodal=inner,
        vision=inner.visual,
        language_model=inner.language_model,
        layers=inner.language_model.layers,
        image_tokens=(config.image_token_id, config.video_token_id),
        grids=grids,
        rotary_rows=3,
        config=config.text_config,
    )
