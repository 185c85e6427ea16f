"""Tiny checkpoints of every family in a folder, laid out as on the Hub: weights, tokenizer, chat template, processor files.

    python -m tests.hub FOLDER     # one of each family, by name

Models are those of `foveate.models.specimens`, with words for their tokenizer: bytes, and the special tokens of the family.
Files of processors have the names and classes of the family's own repositories, in sizes that fit the toy models.
"""

from __future__ import annotations

import json
import sys
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from foveate.models.specimens import SHAPES

_CLIP_NUMBERS = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "rescale_factor": 1 / 255,
    "image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711], "resample": 3,
}  # fmt: skip
_HALVES = _CLIP_NUMBERS | {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
_SIDE = {"height": 64, "width": 64}
_PINPOINTS = [[64, 128], [128, 64], [128, 128]]

_TURN = "{% for message in messages %}"
_PART = "{% if part['type'] == 'image' %}IMAGE{% else %}{{ part['text'] }}{% endif %}"
_PARTS = f"{{% for part in message['content'] %}}{_PART}{{% endfor %}}"


def _template(before: str, image: str, after: str, prompt: str) -> str:
    """A chat template: what stands before and behind each message, for a picture, and before the answer."""
    parts = _PARTS.replace("IMAGE", image)
    return f"{_TURN}{before}{parts}{after}{{% endfor %}}{{% if add_generation_prompt %}}{prompt}{{% endif %}}"


def _chatml(image: str) -> str:
    before, after = "{{ '<|im_start|>' + message['role'] + '\n' }}", "{{ '<|im_end|>\n' }}"
    return _template(before, image, after, "<|im_start|>assistant\n")


@dataclass(frozen=True)
class Family:
    """How a family's repository looks.

    tokens: special tokens beside those of every tokenizer. named: which of them the tokenizer's configuration names.
    ids: of which of them the model's configuration has the id, by its name there.
    picture, video, processor: content of ``preprocessor_config.json``, ``video_preprocessor_config.json`` and
        ``processor_config.json``; None where there is no such file.
    """

    template: str
    tokens: tuple[str, ...]
    ids: dict[str, str]
    picture: dict[str, Any]
    tokenizer: str = "PreTrainedTokenizerFast"
    named: dict[str, str] = field(default_factory=dict)
    video: dict[str, Any] | None = None
    processor: dict[str, Any] | None = None


def _llava(image: str, kind: str, **more: Any) -> Family:
    return Family(
        template=_template("{{ message['role'].upper() + ': ' }}", "<image>\n", " ", "ASSISTANT:"),
        tokens=("<image>",),
        ids={"image_token_id": "<image>", "image_token_index": "<image>"},
        picture={
            **_CLIP_NUMBERS,
            "crop_size": _SIDE,
            "do_center_crop": True,
            "image_processor_type": image,
            "processor_class": kind,
            "size": {"shortest_edge": 64},
            **more,
        },
        processor={
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": 16,
            "processor_class": kind,
            "vision_feature_select_strategy": "default",
        },
    )


def _idefics(image: str, processor: str, **more: Any) -> Family:
    cells = tuple(f"<row_{row}_col_{column}>" for row in range(1, 5) for column in range(1, 5))
    return Family(
        template=_template(
            "<|im_start|>{{ message['role'].capitalize() + ': ' }}", "<image>", "<end_of_utterance>\n", "Assistant:"
        ),
        tokens=("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", "<|im_start|>", *cells),
        ids={"image_token_id": "<image>"},
        picture={
            **_HALVES,
            "do_image_splitting": True,
            "do_pad": True,
            "image_processor_type": image,
            "max_image_size": {"longest_edge": 64},
            "processor_class": processor,
            "resample": 1,
            "size": {"longest_edge": 128},
        },
        processor={"image_seq_len": 4, "processor_class": processor},
        **more,
    )  # fmt: skip


_QWEN_NUMBERS = {**_CLIP_NUMBERS, "merge_size": 2, "patch_size": 4, "temporal_patch_size": 2}
_QWEN_SIZES = {"min_pixels": 32 * 32, "max_pixels": 64 * 64}
_QWEN3_SIZES = {"size": {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}}


def _qwen(image: str, video: str | None, processor: str, sizes: dict[str, Any]) -> Family:
    numbers = {**_QWEN_NUMBERS, **sizes, "processor_class": processor}
    return Family(
        template=_chatml("<|vision_start|><|image_pad|><|vision_end|>"),
        tokens=("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        picture={**numbers, "image_processor_type": image},
        video=None if video is None else {**numbers, "video_processor_type": video},
        tokenizer="Qwen2Tokenizer",
    )


_QWEN3 = _qwen("Qwen2VLImageProcessorFast", "Qwen3VLVideoProcessor", "Qwen3VLProcessor", _QWEN3_SIZES)

FAMILIES: dict[str, Family] = {
    "llava": _llava("CLIPImageProcessor", "LlavaProcessor"),
    "llava_next": _llava(
        "LlavaNextImageProcessor", "LlavaNextProcessor", aspect_ratio_setting="anyres", image_grid_pinpoints=_PINPOINTS
    ),
    "llava_onevision": Family(
        template=_chatml("<image>"),
        tokens=("<image>", "<video>", "<|im_start|>", "<|im_end|>"),
        ids={"image_token_id": "<image>", "image_token_index": "<image>", "video_token_index": "<video>"},
        picture={
            **_HALVES,
            "do_pad": True,
            "image_grid_pinpoints": _PINPOINTS,
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
            "size": _SIDE,
        },
        video={
            **_HALVES,
            "processor_class": "LlavaOnevisionProcessor",
            "size": _SIDE,
            "video_processor_type": "LlavaOnevisionVideoProcessor",
        },
        processor={
            "image_token": "<image>",
            "num_image_tokens": 16,
            "processor_class": "LlavaOnevisionProcessor",
            "video_token": "<video>",
            "vision_aspect_ratio": "anyres_max_9",
            "vision_feature_select_strategy": "full",
        },
        tokenizer="Qwen2Tokenizer",
    ),
    "internvl": Family(
        template=_chatml("<IMG_CONTEXT>\n"),
        tokens=("<img>", "</img>", "<IMG_CONTEXT>", "<video>", "<|im_start|>", "<|im_end|>"),
        ids={"image_token_id": "<IMG_CONTEXT>"},
        named={
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "start_image_token": "<img>",
            "video_token": "<video>",
        },
        picture={
            **_CLIP_NUMBERS,
            "crop_to_patches": False,
            "image_processor_type": "GotOcr2ImageProcessorFast",
            "max_patches": 4,
            "min_patches": 1,
            "processor_class": "InternVLProcessor",
            "size": _SIDE,
        },
        video={
            **_CLIP_NUMBERS,
            "processor_class": "InternVLProcessor",
            "size": _SIDE,
            "video_processor_type": "InternVLVideoProcessor",
        },
        processor={"image_seq_length": 4, "processor_class": "InternVLProcessor"},
        tokenizer="Qwen2Tokenizer",
    ),
    "idefics3": _idefics("Idefics3ImageProcessor", "Idefics3Processor"),
    "smolvlm": _idefics(
        "SmolVLMImageProcessor",
        "SmolVLMProcessor",
        video={
            **_HALVES,
            "processor_class": "SmolVLMProcessor",
            "size": {"longest_edge": 64},
            "video_processor_type": "SmolVLMVideoProcessor",
            "video_sampling": {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 64}},
        },
    ),
    "gemma3": Family(
        template=_template(
            "<start_of_turn>{{ message['role'] + '\n' }}",
            "<start_of_image>",
            "<end_of_turn>\n",
            "<start_of_turn>model\n",
        ),
        tokens=("<start_of_image>", "<end_of_image>", "<image_soft_token>", "<start_of_turn>", "<end_of_turn>"),
        ids={
            "image_token_id": "<image_soft_token>",
            "image_token_index": "<image_soft_token>",
            "boi_token_id": "<start_of_image>",
            "boi_token_index": "<start_of_image>",
            "eoi_token_id": "<end_of_image>",
            "eoi_token_index": "<end_of_image>",
        },
        named={"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"},
        picture={
            **_HALVES,
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": 4,
            "processor_class": "Gemma3Processor",
            "size": _SIDE,
        },
        processor={"image_seq_length": 4, "processor_class": "Gemma3Processor"},
    ),
    "qwen2_vl": _qwen("Qwen2VLImageProcessor", None, "Qwen2VLProcessor", _QWEN_SIZES),
    "qwen2_5_vl": _qwen("Qwen2VLImageProcessor", None, "Qwen2_5_VLProcessor", _QWEN_SIZES),
    "qwen3_vl": _QWEN3,
    "qwen3_vl_moe": _QWEN3,
    "qwen3_5": _QWEN3,
}  # fmt: skip
"""Every supported family, by ``model_type``."""


def write_checkpoint(family: str, folder: Path, seed: int = 0, shape: dict[str, Any] | None = None) -> Path:
    """A random model of a family, of another ``shape`` if given, with all that its repository holds, in ``folder``."""
    repository = FAMILIES[family]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_tokenizer(repository, folder)
    _model(family, repository, vocabulary, seed, shape or SHAPES[family]).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(repository.template)
    files = {"preprocessor": repository.picture, "video_preprocessor": repository.video, "processor": repository.processor}
    for name, content in files.items():
        if content is not None:
            (folder / f"{name}_config.json").write_text(json.dumps(content, indent=2))
    return folder


def write_text_checkpoint(folder: Path, seed: int = 0) -> Path:
    """A random text model with all that its repository holds, in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = _write_words(folder, (), {"tokenizer_class": "PreTrainedTokenizerFast"})
    torch.manual_seed(seed)
    shape = {**SHAPES["llava"]["text_config"], "vocab_size": len(vocabulary), "eos_token_id": None}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '</s>' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return folder


def _write_tokenizer(repository: Family, folder: Path) -> dict[str, int]:
    kind = {"processor_class": repository.picture["processor_class"], "tokenizer_class": repository.tokenizer}
    return _write_words(folder, repository.tokens, kind | repository.named)


def _write_words(folder: Path, tokens: tuple[str, ...], more: dict[str, str]) -> dict[str, int]:
    """Bytes as words behind the special tokens."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *tokens, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {word: number for number, word in enumerate(words)}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(words[: 4 + len(tokens)])
    core.save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 4096,
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        **more,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2))
    return vocabulary


def _model(family: str, repository: Family, vocabulary: dict[str, int], seed: int, shape: dict[str, Any]) -> Any:
    shape = deepcopy(shape) | {name: vocabulary[token] for name, token in repository.ids.items()}
    # Nothing ends an answer early, so that every one is as long as it may be.
    shape["text_config"] |= {"vocab_size": len(vocabulary), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    torch.manual_seed(seed)
    return AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **shape)).eval()


if __name__ == "__main__":
    for name in FAMILIES:
        print(write_checkpoint(name, Path(sys.argv[1]) / name))
