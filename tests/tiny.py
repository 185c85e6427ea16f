"""Tiny random models from configs: the bodies on which engine and methods are tested."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    MistralConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5OmniThinkerConfig,
    Qwen2_5OmniThinkerForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

from tests.several import Several, SeveralConfig

IMAGE = 7
"""Id of the image placeholder in every tiny vocabulary."""
VIDEO = 10
"""Id of the video placeholder."""
AUDIO = 6
"""Id of the placeholder of sound."""
VOCABULARY = 64


def llava(
    *,
    vision: str = "clip",
    grid: int = 4,
    blocks: int = 4,
    layers: int = 4,
    kv_heads: int = 2,
    attention: str = "sdpa",
    seed: int = 0,
) -> LlavaForConditionalGeneration:
    """A LLaVA of so many encoder blocks and decoder layers; ``grid * grid`` visual tokens an image."""
    torch.manual_seed(seed)
    size = dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=blocks,
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


def several(*, layers: int = 4, attention: str = "sdpa", seed: int = 0) -> Several:
    """A LLaVA of two encoders: 16 and 9 visual tokens an image."""
    torch.manual_seed(seed)
    config = SeveralConfig(
        vision_config=CLIPVisionConfig(**_tower(32), projection_dim=16),
        text_config=_text("llama", layers),
        image_token_id=IMAGE,
        vision_feature_layer=-2,
    )
    return _ready(Several(config), attention)


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


def qwen2_vl(*, attention: str = "sdpa", temporal: int = 1, seed: int = 0) -> Qwen2VLForConditionalGeneration:
    """A Qwen2-VL with M-RoPE in sections."""
    torch.manual_seed(seed)
    config = Qwen2VLConfig(
        vision_config=dict(_qwen_vision(temporal), embed_dim=32, mlp_ratio=2, hidden_size=48),
        text_config=_qwen_text(5, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])),
        **_qwen_ids(),
    )
    return _ready(Qwen2VLForConditionalGeneration(config), attention)


def qwen2_5_vl(*, attention: str = "sdpa", temporal: int = 1, seed: int = 0) -> Qwen2_5_VLForConditionalGeneration:
    """A Qwen2.5-VL whose encoder has windows of 2x2 tokens in two of four blocks."""
    torch.manual_seed(seed)
    config = Qwen2_5_VLConfig(
        vision_config=dict(
            _qwen_vision(temporal),
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=48,
            window_size=16,
            fullatt_block_indexes=[1, 3],
        ),
        text_config=_qwen_text(5, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])),
        **_qwen_ids(),
    )
    return _ready(Qwen2_5_VLForConditionalGeneration(config), attention)


def qwen2_5_omni(*, attention: str = "sdpa", temporal: int = 1, seed: int = 0) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """The thinker of a Qwen2.5-Omni: the same, and two blocks that encode sound."""
    torch.manual_seed(seed)
    config = Qwen2_5OmniThinkerConfig(
        vision_config=dict(
            _qwen_vision(temporal),
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=48,
            window_size=16,
            fullatt_block_indexes=[1, 3],
        ),
        text_config=_qwen_text(5, rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2])),
        audio_config=dict(
            d_model=32,
            encoder_layers=2,
            encoder_attention_heads=4,
            encoder_ffn_dim=64,
            output_dim=48,
            num_mel_bins=16,
            n_window=8,
        ),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        audio_token_index=AUDIO,
        vision_start_token_id=8,
        vision_end_token_id=9,
        audio_start_token_id=4,
        audio_end_token_id=5,
    )
    model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    # It takes any such token for the beginning of something, those that it says itself, too.
    model.lm_head.weight.data[:11] = 0
    return _ready(model, attention)


def qwen3_vl(*, attention: str = "sdpa", temporal: int = 1, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL with interleaved M-RoPE and DeepStack features added after the first three decoder layers."""
    torch.manual_seed(seed)
    config = Qwen3VLConfig(**_qwen3_vl(temporal), **_qwen_ids())
    return _ready(Qwen3VLForConditionalGeneration(config), attention)


def qwen3_vl_moe(
    *, attention: str = "sdpa", experts: str = "eager", temporal: int = 1, seed: int = 0
) -> Qwen3VLMoeForConditionalGeneration:
    """A Qwen3-VL that chooses three of six experts in all decoder layers but the second."""
    torch.manual_seed(seed)
    sparse = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, mlp_only_layers=[1])
    config = Qwen3VLMoeConfig(**_qwen3_vl(temporal, **sparse), **_qwen_ids())
    model = Qwen3VLMoeForConditionalGeneration(config)
    model.set_experts_implementation(experts)
    return _ready(model, attention)


def qwen3_5(*, attention: str = "sdpa", temporal: int = 1, seed: int = 0) -> Qwen3_5ForConditionalGeneration:
    """A Qwen3.5 with attention in the last of every four decoder layers, gated, half of each head rotated."""
    torch.manual_seed(seed)
    config = Qwen3_5Config(
        vision_config=dict(
            _qwen_vision(temporal), hidden_size=32, intermediate_size=64, out_hidden_size=48, num_position_embeddings=64
        ),
        text_config=_qwen_text(
            8,
            head_dim=24,
            rope_parameters=dict(
                rope_type="default",
                rope_theta=10000.0,
                partial_rotary_factor=0.5,
                mrope_section=[2, 2, 2],
                mrope_interleaved=True,
            ),
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_key_head_dim=8,
            linear_value_head_dim=8,
        ),
        **_qwen_ids(),
    )
    return _ready(Qwen3_5ForConditionalGeneration(config), attention)


def llava_next(
    *, text: str = "llama", layers: int = 4, attention: str = "sdpa", seed: int = 0
) -> LlavaNextForConditionalGeneration:
    """A LLaVA-NeXT of square tiles of 16 cells, one or two of them in each direction."""
    torch.manual_seed(seed)
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**_tower(image_size=32), projection_dim=16),
        text_config=_text(text, layers),
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]],
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    return _ready(LlavaNextForConditionalGeneration(config), attention)


def llava_onevision(
    *, grid: int = 4, most: int = 2, layers: int = 4, attention: str = "sdpa", seed: int = 0
) -> LlavaOnevisionForConditionalGeneration:
    """A LLaVA-OneVision of tiles of ``grid * grid`` cells; details of more than ``most`` tiles' cells are resized."""
    torch.manual_seed(seed)
    size = 8 * grid
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**_tower(image_size=size), vision_use_head=False),
        text_config=_text("qwen2", layers),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[rows * size, columns * size] for rows in (1, 2) for columns in (1, 2)],
        vision_aspect_ratio=f"anyres_max_{most}",
    )
    return _ready(LlavaOnevisionForConditionalGeneration(config), attention)


def internvl(
    *, text: str = "qwen2", layers: int = 4, attention: str = "sdpa", seed: int = 0
) -> InternVLForConditionalGeneration:
    """An InternVL of tiles of 64 patches, which make 16 tokens."""
    torch.manual_seed(seed)
    config = InternVLConfig(
        vision_config=dict(**_tower(image_size=64), layer_scale_init_value=0.7),
        text_config=_text(text, layers),
        image_token_id=IMAGE,
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    model = InternVLForConditionalGeneration(config)
    with torch.no_grad():  # they start at zero
        model.model.vision_tower.embeddings.cls_token.normal_()
        model.model.vision_tower.embeddings.position_embeddings.normal_()
        for block in model.model.vision_tower.encoder.layer:
            block.lambda_2.uniform_(0.5, 1.0)
    return _ready(model, attention)


def idefics3(*, layers: int = 4, attention: str = "sdpa", seed: int = 0) -> Idefics3ForConditionalGeneration:
    """An Idefics3 of tiles of 64 patches, which make 16 tokens."""
    torch.manual_seed(seed)
    config = Idefics3Config(
        vision_config=_tower(image_size=64), text_config=_text("llama", layers), image_token_id=IMAGE, scale_factor=2
    )
    return _ready(Idefics3ForConditionalGeneration(config), attention)


def smolvlm(*, layers: int = 4, attention: str = "sdpa", seed: int = 0) -> SmolVLMForConditionalGeneration:
    """A SmolVLM of tiles of 256 patches, of which 16 make a token."""
    torch.manual_seed(seed)
    config = SmolVLMConfig(
        vision_config=_tower(image_size=64, patch_size=4),
        text_config=_text("llama", layers),
        image_token_id=IMAGE,
        scale_factor=4,
    )
    return _ready(SmolVLMForConditionalGeneration(config), attention)


def text(*, kind: str = "llama", layers: int = 4, attention: str = "sdpa", seed: int = 0) -> Any:
    """A decoder alone: llama, mistral, qwen2, qwen3, or qwen3_moe, which chooses three of six experts in most layers."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_text(kind, layers))
    if kind == "qwen3_moe":
        model.set_experts_implementation("eager")  # the only one in double precision
    return _ready(model, attention)


def _qwen3_vl(temporal: int, **text: Any) -> dict[str, Any]:
    return dict(
        vision_config=dict(
            _qwen_vision(temporal),
            hidden_size=32,
            intermediate_size=64,
            out_hidden_size=48,
            deepstack_visual_indexes=[0, 1, 2],
            num_position_embeddings=64,
        ),
        text_config=_qwen_text(
            5,
            head_dim=12,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 2, 2], mrope_interleaved=True),
            **text,
        ),
    )


def _qwen_vision(temporal: int) -> dict[str, int]:
    return dict(depth=4, num_heads=4, patch_size=4, temporal_patch_size=temporal, spatial_merge_size=2)


def _qwen_text(layers: int, **more: Any) -> dict[str, Any]:
    return dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **more,
    )


def _qwen_ids() -> dict[str, int]:
    return dict(image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=8, vision_end_token_id=9)


def _tower(image_size: int, patch_size: int = 8) -> dict[str, Any]:
    return dict(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=image_size,
        patch_size=patch_size,
    )


def _text(kind: str, layers: int) -> Any:
    """A decoder of four heads over two; Mistral's without a window."""
    configs = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "qwen3_moe": Qwen3MoeConfig,
    }
    experts = dict(num_experts=6, num_experts_per_tok=3, moe_intermediate_size=32, mlp_only_layers=[1])
    return configs[kind](
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        sliding_window=None,
        tie_word_embeddings=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
        **(experts if kind == "qwen3_moe" else {}),
    )


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
