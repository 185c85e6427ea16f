"""Tiny random models from configs: the bodies on which engine and methods are tested."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE = 7
"""Id of the image placeholder in every tiny vocabulary."""
VOCABULARY = 64


def llava(
    *, vision: str = "clip", grid: int = 4, layers: int = 4, kv_heads: int = 2, attention: str = "sdpa", seed: int = 0
) -> LlavaForConditionalGeneration:
    """A LLaVA of four encoder and four decoder layers; ``grid * grid`` visual tokens an image."""
    torch.manual_seed(seed)
    size = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=8 * grid,
        patch_size=8,
    )
    tower = CLIPVisionConfig(**size, projection_dim=16) if vision == "clip" else SiglipVisionConfig(**size)
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=text,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default" if vision == "clip" else "full",
    )
    return _ready(LlavaForConditionalGeneration(config), attention)


def gemma3(*, attention: str = "sdpa", seed: int = 0) -> Gemma3ForConditionalGeneration:
    """A Gemma 3 with sliding and full layers, two rotary tables, bidirectional images of 16 tokens."""
    torch.manual_seed(seed)
    config = Gemma3Config(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            image_size=64,
            patch_size=8,
            vision_use_head=False,
        ),
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            sliding_window=12,
            layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
            query_pre_attn_scalar=12,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_id=IMAGE,
        boi_token_id=8,
        eoi_token_id=9,
        mm_tokens_per_image=16,
    )
    return _ready(Gemma3ForConditionalGeneration(config), attention)


def qwen3_vl(*, attention: str = "sdpa", seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL with M-RoPE and DeepStack features added after the first three decoder layers."""
    torch.manual_seed(seed)
    config = Qwen3VLConfig(
        vision_config=dict(
            hidden_size=32,
            intermediate_size=64,
            depth=4,
            num_heads=4,
            patch_size=4,
            temporal_patch_size=1,
            spatial_merge_size=2,
            out_hidden_size=48,
            deepstack_visual_indexes=[0, 1, 2],
            num_position_embeddings=64,
        ),
        text_config=dict(
            vocab_size=VOCABULARY,
            hidden_size=48,
            intermediate_size=96,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=12,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2], mrope_interleaved=True),
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=None,
        ),
        image_token_id=IMAGE,
        video_token_id=10,
        vision_start_token_id=8,
        vision_end_token_id=9,
    )
    return _ready(Qwen3VLForConditionalGeneration(config), attention)


def _ready(model: Any, attention: str) -> Any:
    model.set_attn_implementation(attention)
    # Random weights of the usual scale give nearly flat attention and nearly equal rows; louder ones tell rows apart.
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.mul_(4.0)
            elif "embed_tokens" in name:
                parameter.mul_(20.0)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()
