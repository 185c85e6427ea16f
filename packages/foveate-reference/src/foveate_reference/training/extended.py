"""The two larger reference models, from configurations: one with tiles as LLaVA-NeXT has, one like Qwen2.5-VL.

Both speak the words of all generated tasks and share the decoder's shape, so that each starts from the decoder of another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from foveate.reference.model import (
    ASSISTANT,
    CHAT_TEMPLATE,
    IMAGE,
    SPECIAL,
    USER,
    Dimensions,
    build_tokenizer,
    token_settings,
    vision_config,
)  # fmt: skip
from foveate.reference.picture_processor import VIDEO, PictureProcessor
from foveate.tasks.board import DIGITS
from foveate.tasks.scenes import SIZE
from foveate.tasks.series import FRAMES
from foveate.tasks.spine import PATCH, VOCABULARY

VISION_START, VISION_END = "<vision>", "</vision>"
LINES = 24
"""Rows and columns of the largest pictures, in cells of 8 pixels."""

WORDS = (
    *SPECIAL, *VOCABULARY, VISION_START, VISION_END, VIDEO, *DIGITS, *FRAMES,
    *(f"row{i}" for i in range(13, LINES + 1)), *(f"col{i}" for i in range(13, LINES + 1)),
    "above", "appear", "appears", "bar", "below", "both", "bottommost", "button", "came", "click", "column", "describe",
    "first", "for", "frame", "has", "high", "higher", "highest", "last", "left", "leftmost", "line", "lowest", "moment",
    "more", "neither", "only", "or", "right", "rightmost", "row", "second", "shows", "than", "topmost", "value", "when",
)  # fmt: skip
"""Every token: first those of the small reference model, with the same ids, then what the other tasks need."""
IDS = {word: number for number, word in enumerate(WORDS)}

GRIDS = [[SIZE, SIZE], [SIZE, 2 * SIZE], [2 * SIZE, SIZE], [2 * SIZE, 2 * SIZE]]
"""Heights and widths in which the model with tiles sees details."""

DEFAULT = Dimensions()
_QWEN_IMAGE = VISION_START + IMAGE + VISION_END


def build_tiles(dimensions: Dimensions = DEFAULT) -> LlavaNextForConditionalGeneration:
    """An untrained LLaVA-NeXT whose tiles are the pictures of the small reference model."""
    text = LlamaConfig(**_decoder(dimensions), **token_settings())
    config = LlavaNextConfig(
        vision_config=vision_config(dimensions),
        text_config=text,
        image_token_index=IDS[IMAGE],
        image_grid_pinpoints=GRIDS,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **token_settings(),
    )
    return _generating(LlavaNextForConditionalGeneration(config))


def build_qwen(dimensions: Dimensions = DEFAULT) -> Qwen2_5_VLForConditionalGeneration:
    """An untrained Qwen2.5-VL: patches of 8 pixels, merged two by two, windows of 96 pixels, any resolution."""
    vision = {
        "depth": dimensions.vision_layers,
        "hidden_size": dimensions.vision_width,
        "intermediate_size": 3 * dimensions.vision_width,
        "num_heads": dimensions.vision_width // dimensions.head_width,
        "out_hidden_size": dimensions.decoder_width,
        "patch_size": PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": SIZE,
        "fullatt_block_indexes": [dimensions.vision_layers // 2, dimensions.vision_layers - 1],
    }
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": _sections(dimensions.head_width)}
    config = Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**_decoder(dimensions), "rope_parameters": rope, **token_settings()},
        image_token_id=IDS[IMAGE],
        video_token_id=IDS[VIDEO],
        vision_start_token_id=IDS[VISION_START],
        vision_end_token_id=IDS[VISION_END],
        tie_word_embeddings=True,
        **token_settings(),
    )
    return _generating(Qwen2_5_VLForConditionalGeneration(config))


def tiles_processor() -> LlavaNextProcessor:
    """Pictures become an overview and up to four tiles."""
    side = {"height": SIZE, "width": SIZE}
    return LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": SIZE}, crop_size=side, image_grid_pinpoints=GRIDS, do_center_crop=False
        ),
        tokenizer=_tokenizer(),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def qwen_processor() -> PictureProcessor:
    """Pictures keep their size, to the next multiple of 16 pixels, up to 384 x 384."""
    pixels = {"min_pixels": (2 * PATCH) ** 2, "max_pixels": (4 * SIZE) ** 2}
    image = Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, temporal_patch_size=2, **pixels)
    return PictureProcessor(image, _tokenizer(), chat_template=CHAT_TEMPLATE.replace(IMAGE, _QWEN_IMAGE))


@dataclass(frozen=True)
class Kind:
    """One of the two: how to build it, its processor, what stands around a picture's placeholders, its last projection."""

    name: str
    build: Any
    processor: Any
    around: tuple[str, ...]
    projector: Any

    @property
    def tiled(self) -> bool:
        """Whether pictures come as an overview and tiles."""
        return self.name == "tiles"


KINDS = {
    "tiles": Kind("tiles", build_tiles, tiles_processor, (), lambda model: model.model.multi_modal_projector.linear_2),
    "qwen": Kind(
        "qwen", build_qwen, qwen_processor, (VISION_START, VISION_END), lambda model: model.model.visual.merger.mlp[-1]
    ),
}


def _decoder(dimensions: Dimensions) -> dict[str, Any]:
    heads = dimensions.decoder_width // dimensions.head_width
    return {
        "vocab_size": len(WORDS),
        "hidden_size": dimensions.decoder_width,
        "intermediate_size": dimensions.decoder_mlp,
        "num_hidden_layers": dimensions.decoder_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    }


def _sections(head_width: int) -> list[int]:
    """M-RoPE's sections in Qwen2.5-VL's proportions, 2 to 3 to 3."""
    half = head_width // 2
    return [half - 2 * (3 * half // 8), 3 * half // 8, 3 * half // 8]


def _generating(model: Any) -> Any:
    model.generation_config.update(do_sample=False, max_new_tokens=48, **token_settings())
    return model


def _tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(IDS, (USER, ASSISTANT, IMAGE, VISION_START, VISION_END, VIDEO))


def start_from(model: Any, other: Any) -> None:
    """Copy every weight that ``other`` has in the same place; of the embedding the rows that it has."""
    own = model.state_dict()
    with torch.no_grad():
        for name, weight in other.state_dict().items():
            if name in own and own[name].shape[1:] == weight.shape[1:]:
                own[name][: len(weight)] = weight[: len(own[name])]
