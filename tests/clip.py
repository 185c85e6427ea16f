"""A tiny CLIP with a text tower and a tokenizer of its own: the companion of the tiny LLaVAs."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

WORDS = tuple(f"w{number}" for number in range(11, 64))
"""The words of the tiny vocabularies, of which the 11th is the first (see `tests.tiny`)."""


def clip(width: int = 32) -> CLIPModel:
    """A random CLIP whose vision tower is ``width`` wide."""
    torch.manual_seed(5)
    size: dict[str, Any] = dict(num_hidden_layers=2, num_attention_heads=2, projection_dim=12)
    text = dict(size, vocab_size=len(WORDS) + 4, hidden_size=16, intermediate_size=32, bos_token_id=1, eos_token_id=2)
    vision = dict(size, hidden_size=width, intermediate_size=32, image_size=32, patch_size=8)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    with torch.no_grad():  # norms start as the identity, and embeddings so close to zero that all texts are alike
        model.vision_model.post_layernorm.weight.uniform_(0.5, 2.0)
        model.text_model.embeddings.token_embedding.weight.mul_(50)
    return model


def text_tokenizer() -> PreTrainedTokenizerFast:
    """CLIP's: begins and ends each text, and counts its words from the last one down."""
    vocabulary = {token: number for number, token in enumerate(("<pad>", "<s>", "</s>", "<unk>", *reversed(WORDS)))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def tokenizer() -> PreTrainedTokenizerFast:
    """The one of the tiny models: id 11 is the word ``w11``, what comes before is special."""
    special = [f"<{number}>" for number in range(11)]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate((*special, *WORDS))}, unk_token="<3>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, additional_special_tokens=special)
