"""A small random model of every supported family, to ask what it could host; nothing is downloaded.

Widths are toy widths; depth, and the pattern of hybrid layers, are enough for the methods' defaults to mean something.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from foveate.models.text import FAMILY as TEXT

_TEXT: dict[str, Any] = dict(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
_LLAMA = dict(_TEXT, model_type="llama")
_QWEN2 = dict(_TEXT, model_type="qwen2")
_TOWER: dict[str, Any] = dict(
    hidden_size=32, intermediate_size=64, num_hidden_layers=8, num_attention_heads=4, image_size=64, patch_size=16
)
_CLIP = dict(_TOWER, model_type="clip_vision_model", projection_dim=16)
_SIGLIP = dict(_TOWER, model_type="siglip_vision_model", vision_use_head=False)
_PACKED: dict[str, Any] = dict(depth=8, num_heads=4, hidden_size=32, intermediate_size=64, out_hidden_size=32, patch_size=4)
_IMAGE = dict(image_token_id=4, image_token_index=4)
_QWEN_IDS = dict(_IMAGE, video_token_id=5, vision_start_token_id=6, vision_end_token_id=7)
_PINPOINTS = [[64, 128], [128, 64], [128, 128]]


def _mrope(**more: Any) -> dict[str, Any]:
    return dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1], **more)


SHAPES: dict[str, dict[str, Any]] = {
    "llava": dict(_IMAGE, vision_config=_CLIP, text_config=_LLAMA),
    "llava_next": dict(_IMAGE, vision_config=_CLIP, text_config=_LLAMA, image_grid_pinpoints=_PINPOINTS),
    "llava_onevision": dict(
        _IMAGE, video_token_index=5, vision_config=_SIGLIP, text_config=_QWEN2, image_grid_pinpoints=_PINPOINTS
    ),
    "internvl": dict(_IMAGE, vision_config=dict(_TOWER, model_type="internvl_vision"), text_config=_QWEN2),
    "idefics3": dict(_IMAGE, vision_config=_TOWER, text_config=_LLAMA),
    "smolvlm": dict(_IMAGE, vision_config=_TOWER, text_config=_LLAMA),
    "gemma3": dict(_IMAGE, vision_config=_SIGLIP, text_config=_TEXT, boi_token_id=6, eoi_token_id=7, mm_tokens_per_image=4),
    "qwen2_vl": dict(
        _QWEN_IDS,
        vision_config=dict(depth=8, num_heads=4, embed_dim=32, mlp_ratio=2, hidden_size=32, patch_size=4),
        text_config=dict(_TEXT, rope_parameters=_mrope()),
    ),
    "qwen2_5_vl": dict(
        _QWEN_IDS,
        vision_config=dict(_PACKED, fullatt_block_indexes=[3, 7]),
        text_config=dict(_TEXT, rope_parameters=_mrope()),
    ),
    "qwen3_vl": dict(
        _QWEN_IDS,
        vision_config=dict(_PACKED, deepstack_visual_indexes=[1, 3, 5]),
        text_config=dict(_TEXT, rope_parameters=_mrope(mrope_interleaved=True)),
    ),
    "qwen3_vl_moe": dict(
        _QWEN_IDS,
        vision_config=dict(_PACKED, deepstack_visual_indexes=[1, 3, 5]),
        text_config=dict(
            _TEXT,
            rope_parameters=_mrope(mrope_interleaved=True),
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
    ),
    "qwen2_5_omni_thinker": dict(
        _QWEN_IDS,
        video_token_index=5,
        audio_token_index=8,
        vision_config=dict(_PACKED, fullatt_block_indexes=[3, 7]),
        text_config=dict(_TEXT, rope_parameters=_mrope()),
        audio_config=dict(
            d_model=32, encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=64, output_dim=32, num_mel_bins=16
        ),
    ),
    "qwen3_5": dict(
        _QWEN_IDS,
        vision_config=_PACKED,
        text_config=dict(
            _TEXT,
            head_dim=32,
            rope_parameters=_mrope(mrope_interleaved=True, partial_rotary_factor=0.25),
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
    ),
}
"""What the configuration of each family with pictures says other than its defaults, by ``model_type``."""
FAMILIES = (*SHAPES, TEXT)
"""All families."""


def specimen(family: str) -> nn.Module:
    """A model of ``family`` with 8 decoder layers; where they are of several kinds, in the family's own pattern."""
    if family == TEXT:
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**_LLAMA)).eval()
    config = AutoConfig.for_model(family, **SHAPES[family])
    return AutoModelForImageTextToText.from_config(config).eval()
