"""A tiny family of several encoders, as no library has it: each encodes every picture, and has a projector of its own.

Tokens of a picture come one encoder's behind the other's (METEOR's "post-projection fusion").
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling

from foveate import models
from foveate.models.anatomy import Anatomy, Encoder, Picture, View
from foveate.models.decoder import layers_of
from foveate.models.llava import blocks, halves

FAMILY = "several"
SIDES = (4, 3)
"""Patches in a row of a picture, in each encoder."""
COUNT = sum(side * side for side in SIDES)


class SeveralConfig(LlavaConfig):
    """LLaVA's, of a family of its own."""

    model_type = FAMILY


class Towers(nn.Module):
    """A CLIP encoder and a SigLIP one, which sees the picture smaller; each in front of its projector."""

    def __init__(self, width: int) -> None:
        super().__init__()
        size = dict(hidden_size=32, intermediate_size=64, num_attention_heads=4, patch_size=8)
        clip = CLIPVisionConfig(**size, num_hidden_layers=5, image_size=8 * SIDES[0], projection_dim=16)
        siglip = SiglipVisionConfig(**size, num_hidden_layers=4, image_size=8 * SIDES[1])
        self.towers = nn.ModuleList([CLIPVisionModel(clip), SiglipVisionModel(siglip)])
        self.projectors = nn.ModuleList(
            nn.Sequential(nn.Linear(32, width), nn.GELU(), nn.Linear(width, width)) for _ in self.towers
        )

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Tokens ``[I, n, width]`` of each encoder: of the last but one block, without CLS."""
        made = []
        for tower, projector, side in zip(self.towers, self.projectors, SIDES):
            shown = nn.functional.interpolate(pixels, size=8 * side, mode="nearest")
            x = tower(shown, output_hidden_states=True, return_dict=True).hidden_states[-2]
            made.append(projector(x[:, 1:] if len(made) == 0 else x))
        return made


class SeveralModel(LlavaModel):
    """LLaVA's, with several encoders."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        del self.multi_modal_projector
        self.vision_tower = Towers(config.text_config.hidden_size)

    def get_image_features(self, pixel_values: Tensor, return_dict: bool = True, **kwargs: Any) -> Any:
        """Tokens of each picture, one encoder's behind the other's."""
        joined = torch.cat(self.vision_tower(pixel_values), dim=1)
        return BaseModelOutputWithPooling(pooler_output=list(joined))  # type: ignore[arg-type]

    def set_attn_implementation(self, *args: Any, **kwargs: Any) -> None:
        """Of the encoders, too."""
        super().set_attn_implementation(*args, **kwargs)
        for tower in self.vision_tower.towers:
            tower.set_attn_implementation(*args, **kwargs)


class Several(LlavaForConditionalGeneration):
    """The whole."""

    config_class = SeveralConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = SeveralModel(config)


def anatomy(model: Any) -> Anatomy:
    """Anatomy of a `Several`."""
    inner, cells = model.model, [torch.arange(side * side)[:, None] for side in SIDES]

    def pictures(bound: Mapping[str, Any]) -> list[Picture]:
        return [
            Picture(
                tuple(
                    View(side, side, cells=mine + number * side * side, encoder=encoder)
                    for encoder, (side, mine) in enumerate(zip(SIDES, cells))
                )
            )
            for number in range(len(bound["pixel_values"]))
        ]

    encoders = [
        Encoder(
            blocks=blocks(tower),
            attention=[block.self_attn for block in blocks(tower)],
            feature_layer=len(blocks(tower)) - 2,
            prefix=int(encoder == 0),
            projector=projector,
            tile=side * side,
            halves=halves,
        )
        for encoder, (tower, projector, side) in enumerate(
            zip(inner.vision_tower.towers, inner.vision_tower.projectors, SIDES)
        )
    ]
    return Anatomy(
        family=FAMILY,
        model=model,
        multimodal=inner,
        vision=inner.vision_tower,
        language_model=inner.language_model,
        layers=layers_of(inner.language_model),
        image_tokens=(model.config.image_token_id,),
        pictures=pictures,
        encoders=tuple(encoders),
        config=model.config.text_config,
    )


models._FAMILIES.setdefault(FAMILY, anatomy)
