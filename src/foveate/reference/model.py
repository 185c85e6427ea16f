"""The reference model from configurations: an ordinary Hugging Face LLaVA, small enough to train on two CPU cores."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from foveate.reference.published import respell
from foveate.tasks.scenes import SIZE
from foveate.tasks.spine import PATCH, VOCABULARY

PAD, UNKNOWN, BEGIN, END, USER, ASSISTANT, IMAGE = SPECIAL = (
    "<pad>", "<unk>", "<s>", "</s>", "<user>", "<assistant>", "<image>",
)  # fmt: skip
TOKEN_IDS = {token: index for index, token in enumerate((*SPECIAL, *VOCABULARY))}

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<user>' if message['role'] == 'user' else '<assistant>' if message['role'] == 'assistant' else '' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}"
    "{% endif %}"
    "{{ '</s>' if message['role'] == 'assistant' else '' }}"
    "{% endfor %}"
    "{{ '<assistant>' if add_generation_prompt else '' }}"
)


@dataclass(frozen=True)
class Dimensions:
    """Sizes of the reference model; the defaults are the shipped checkpoint's."""

    vision_width: int = 128
    vision_layers: int = 7
    decoder_width: int = 192
    decoder_layers: int = 8
    decoder_mlp: int = 448
    head_width: int = 64
    text_layers: int = 2
    projection: int = 64


class TextTower(nn.Module):
    """The CLIP side: a small text encoder and the projections of both towers into one space.

    ``image_embeds`` takes the vision tower's pooled CLS, ``pooler_output`` of ``model.model.vision_tower``.
    """

    def __init__(self, text: CLIPTextModelWithProjection, vision_width: int) -> None:
        super().__init__()
        self.text = text
        self.visual_projection = nn.Linear(vision_width, text.config.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def image_embeds(self, pooled: torch.Tensor) -> torch.Tensor:
        """Unit vectors ``[B, projection]`` for pooled CLS features ``[B, vision_width]``."""
        return nn.functional.normalize(self.visual_projection(pooled), dim=-1)

    def text_embeds(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """Unit vectors ``[B, projection]`` for token ids ``[B, T]`` that end with the end token."""
        out = self.text(input_ids=input_ids, attention_mask=attention_mask)
        return nn.functional.normalize(out.text_embeds, dim=-1)

    def save(self, folder: Path) -> None:
        """Write the text encoder as a Hugging Face checkpoint and the visual projection beside it."""
        self.text.save_pretrained(folder)
        rest = {"visual_projection.weight": self.visual_projection.weight.data, "logit_scale": self.logit_scale.data}
        save_file({name: tensor.contiguous() for name, tensor in rest.items()}, folder / "projection.safetensors")

    @classmethod
    def load(cls, folder: Path) -> TextTower:
        """Read what ``save`` wrote."""
        text = CLIPTextModelWithProjection.from_pretrained(folder)
        rest = load_file(folder / "projection.safetensors")
        tower = cls(text, rest["visual_projection.weight"].shape[1])
        tower.visual_projection.weight.data = rest["visual_projection.weight"]
        tower.logit_scale.data = rest["logit_scale"]
        return tower.eval()


def build_model(dimensions: Dimensions = Dimensions()) -> LlavaForConditionalGeneration:
    """An untrained reference model; weights follow torch's global seed."""
    decoder = LlamaConfig(
        vocab_size=len(TOKEN_IDS),
        hidden_size=dimensions.decoder_width,
        intermediate_size=dimensions.decoder_mlp,
        num_hidden_layers=dimensions.decoder_layers,
        num_attention_heads=dimensions.decoder_width // dimensions.head_width,
        num_key_value_heads=dimensions.decoder_width // dimensions.head_width,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        **token_settings(),
    )
    config = LlavaConfig(
        vision_config=vision_config(dimensions),
        text_config=decoder,
        image_token_index=TOKEN_IDS[IMAGE],
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **token_settings(),
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.update(do_sample=False, max_new_tokens=8, **token_settings())
    return model


def vision_config(dimensions: Dimensions) -> CLIPVisionConfig:
    """The vision tower, of the small model and of the one with tiles."""
    return CLIPVisionConfig(
        hidden_size=dimensions.vision_width,
        intermediate_size=4 * dimensions.vision_width,
        num_hidden_layers=dimensions.vision_layers,
        num_attention_heads=dimensions.vision_width // dimensions.head_width,
        projection_dim=dimensions.projection,
        image_size=SIZE,
        patch_size=PATCH,
    )


def build_text_tower(dimensions: Dimensions = Dimensions()) -> TextTower:
    """An untrained text tower over the same vocabulary."""
    config = CLIPTextConfig(
        vocab_size=len(TOKEN_IDS),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=dimensions.text_layers,
        num_attention_heads=4,
        projection_dim=dimensions.projection,
        max_position_embeddings=64,
        **token_settings(),
    )
    return TextTower(CLIPTextModelWithProjection(config), dimensions.vision_width)


def build_tokenizer(ids: dict[str, int], marks: Sequence[str], **names: str) -> PreTrainedTokenizerFast:
    """Words become the ``ids``; ``marks`` are special beside padding, the unknown, beginning and end, some by ``names``."""
    core = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=list(marks),
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **names,
    )


def build_processor() -> LlavaProcessor:
    """The processor: any picture is squeezed to the model's square, words become the ids of ``TOKEN_IDS``."""
    side = {"height": SIZE, "width": SIZE}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=side, crop_size=side, do_center_crop=False),
        tokenizer=build_tokenizer(TOKEN_IDS, (USER, ASSISTANT, IMAGE)),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        # The processor subtracts the CLS token that the "default" strategy removes, so it has to be counted first.
        num_additional_image_tokens=1,
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    )


def save_checkpoint(model: LlavaForConditionalGeneration, tower: TextTower, folder: Path) -> None:
    """Write a complete, offline-loadable checkpoint folder: model, processor, text tower."""
    model.save_pretrained(folder)
    respell(folder)
    build_processor().save_pretrained(folder)
    tower.save(folder / "text_tower")
    # Readers in the field look for either spelling.
    config = json.loads((folder / "config.json").read_text())
    config["image_token_id"] = config["image_token_index"] = TOKEN_IDS[IMAGE]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def token_settings() -> dict[str, int]:
    """Ids of padding, beginning and end, the same for all reference models."""
    return {"pad_token_id": TOKEN_IDS[PAD], "bos_token_id": TOKEN_IDS[BEGIN], "eos_token_id": TOKEN_IDS[END]}
