"""Qwen3-VL: images of any size, 2x2 patch merging, M-RoPE, DeepStack features added after the first decoder layers.

Encoder signals are not offered yet: they come by patch, four to a token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from saccade.models.anatomy import Anatomy, Picture, View


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a ``Qwen3VLForConditionalGeneration``."""
    config, inner = model.config, model.model
    merge = config.vision_config.spatial_merge_size

    def pictures(bound: Mapping[str, Any]) -> list[Picture]:
        thw: Tensor = bound["image_grid_thw"] if bound.get("image_grid_thw") is not None else bound["video_grid_thw"]
        # Frames of a video lie one below the other in a single grid.
        return [Picture((View(t * h // merge, w // merge, t),)) for t, h, w in thw.tolist()]

    return Anatomy(
        family="qwen3_vl",
        model=model,
        multimodal=inner,
        vision=inner.visual,
        language_model=inner.language_model,
        layers=inner.language_model.layers,
        image_tokens=(config.image_token_id,),
        video_tokens=(config.video_token_id,),
        pictures=pictures,
        rotary_rows=3,
        config=config.text_config,
    )
