"""The model under test: the embedded reference model, a checkpoint folder, or a checkpoint on the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError
from PIL import Image
from safetensors import SafetensorError
from transformers import AutoModelForImageTextToText
from transformers.utils import logging

from foveate import reference
from foveate.core.artifact import Artifact
from foveate.core.companion import Companion
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.traits import Traits
from foveate.engine import ClipCompanion, Session, attach
from foveate.models import anatomy

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_HUB_SECONDS = 10
_UNLOADABLE = (OSError, ValueError, KeyError, ImportError, SafetensorError)
_REFUSALS = (ValueError, RuntimeError, ArithmeticError)
"""What processors raise over pictures that they cannot take."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class Checkpoint:
    """A model in evaluation mode with its processor, the name under which it was asked for, and what lies beside it.

    Attributes:
        companion: a text tower.
        artifacts: calibrated numbers, besides those in the model's own folder.
    """

    name: str
    model: Any
    processor: Any
    companion: Companion | None = None
    artifacts: tuple[Artifact, ...] = ()

    def attach(self, recipe: Recipe | str, seed: int = 0) -> Session:
        """`foveate.attach`, with all that lies beside the model."""
        return attach(self.model, recipe, seed=seed, companion=self.companion, artifacts=self.artifacts)

    @property
    def traits(self) -> Traits:
        """What methods may know of the model, and of what lies beside it."""
        return anatomy(self.model).traits(self.companion is not None, self.artifacts)

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def inputs(self, pictures: Sequence[Sequence[Image.Image]], prompts: Sequence[str]) -> dict[str, torch.Tensor]:
        """Model inputs for one conversation each, its pictures and then a prompt, padded on the left."""
        try:
            return self.chat([_opening(images, prompt) for images, prompt in zip(pictures, prompts, strict=True)])
        except _REFUSALS:
            for images in pictures:
                reason = refusal(self.processor, images)
                if reason is not None:
                    raise FoveateError(reason) from None
            raise

    def chat(self, conversations: Sequence[Sequence[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """Model inputs for conversations as transformers' chat templates take them, padded on the left."""
        inputs = _processed(self.processor, conversations)
        return inputs.to(self.model.device, dtype=self.model.dtype)

    def refuse_placeholders(self, prompts: Iterable[str]) -> None:
        """Refuse prompts that name the place of a picture: all pictures stand in front."""
        placeholder = getattr(self.processor, "image_token", None)
        for prompt in prompts:
            if placeholder and placeholder in prompt:
                raise FoveateError(f"prompt={prompt!r}: leave out {placeholder!r}; the picture is put in front by itself")

    @torch.inference_mode()
    def converse(self, pictures: Sequence[Image.Image], prompts: Sequence[str], max_new_tokens: int) -> list[str]:
        """The greedy answer to each of several prompts about the same pictures, all turns on one cache."""
        inputs = self.inputs([pictures], prompts[:1])
        settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
        output, answers = None, []
        for number, prompt in enumerate(prompts):
            if output is not None:
                ids = self._continued(output.sequences[0], prompts[number - 1], prompt)
                inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
                settings["past_key_values"] = output.past_key_values
            output = self.model.generate(**inputs, **settings)
            new = output.sequences[0, inputs["input_ids"].shape[1] :]
            answers.append(self.processor.decode(new, skip_special_tokens=True).strip())
        return answers

    def _continued(self, sequence: torch.Tensor, asked: str, prompt: str) -> torch.Tensor:
        """The ids so far with the next turn behind them, ``[1, n]``: what the chat template puts behind an answer."""
        answer = "\N{OBJECT REPLACEMENT CHARACTER}"
        turns = [*_opening([], asked), {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        turns += _opening([], prompt)
        rendered = self.processor.apply_chat_template(turns, add_generation_prompt=True)
        behind = self.processor.tokenizer(
            rendered.rpartition(answer)[2], add_special_tokens=False, return_tensors="pt"
        ).input_ids[0]
        # The model may or may not have ended its answer itself.
        ended = int(len(behind) > 0 and bool(sequence[-1] == behind[0]))
        return torch.cat([sequence[: len(sequence) - ended], behind.to(sequence.device)])[None]

    @torch.inference_mode()
    def answer(self, inputs: dict[str, torch.Tensor], max_new_tokens: int) -> list[str]:
        """The greedy answer to each conversation."""
        output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        return [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]


def refusal(processor: Any, pictures: Sequence[Image.Image]) -> str | None:
    """Why a processor refuses one of the pictures, in a line; None if it takes them all."""
    for picture in pictures:
        try:
            _processed(processor, [_opening([picture], "?")])
        except _REFUSALS as error:
            named = picture.info.get("source", "image")
            width, height = picture.size
            return f"{named}: {width} x {height} pixels, which the model's processor refuses ({_first_line(error)})"
    return None


def _processed(processor: Any, conversations: Sequence[Sequence[dict[str, Any]]]) -> Any:
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def resolve_device(device: str) -> str:
    """``auto`` becomes the accelerator that is there; anything else must be a device that works."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise FoveateError(f"device={device!r}: is not available here; use auto, cpu or cuda") from error
    return device


def resolve_dtype(dtype: str, device: str) -> str:
    """``auto`` becomes float32 on a CPU, where it is the fastest that all of them have, and bfloat16 elsewhere."""
    if dtype == "auto":
        return "float32" if device == "cpu" else "bfloat16"
    if dtype not in _DTYPES:
        raise FoveateError(f"dtype={dtype!r}: must be auto, {', '.join(_DTYPES)}")
    return dtype


def local_folder(name: str) -> Path | None:
    """The folder that a model's name means, or None where it can only be a Hub id."""
    if name not in reference.MODELS:
        return Path(name) if Path(name).is_dir() else None
    return reference.path(name)


def load(
    name: str, device: str, dtype: str, companion: str | None = None, artifacts: str | Path | None = None
) -> Checkpoint:
    """Load a model and its processor by name; ``device`` and ``dtype`` are resolved.

    ``companion`` names a CLIP checkpoint; without one, the text tower that lies in the model's folder is taken, if any.
    ``artifacts`` names a folder of calibrated numbers.
    """
    brought = tuple(Artifact.all_in(artifacts)) if artifacts is not None else ()
    found, cached_only = _place(name)
    source = found or name
    try:
        processor = reference.processor(source, local_files_only=cached_only)
        model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=_DTYPES[dtype], local_files_only=cached_only)
    except _UNLOADABLE as error:
        raise _unloadable(name, error) from error
    if not getattr(processor, "chat_template", None):
        raise FoveateError(f"model={name!r}: its processor has no chat template; add chat_template.jinja to the checkpoint")
    # A family that is not supported is one mistake, not one in every cell.
    anatomy(model)
    # Decoding continues at the right end of every row.
    processor.tokenizer.padding_side = "left"
    model = model.to(device).eval()
    if companion is not None:
        beside: Companion | None = _clip(companion, processor.tokenizer, device, dtype)
    else:
        beside = reference.companion(model, found) if found else None
    return Checkpoint(name, model, processor, beside, brought)


def load_processor(name: str) -> Any:
    """The processor of a model, by the model's name."""
    found, cached_only = _place(name)
    try:
        return reference.processor(found or name, local_files_only=cached_only)
    except _UNLOADABLE as error:
        raise _unloadable(name, error) from error


def _place(name: str) -> tuple[Path | None, bool]:
    """The folder of a model, if it has one; else whether it can only be had from the cache."""
    # What transformers has to say about loading and generating would drown the one line that matters.
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    found = local_folder(name)
    if found is None and not _HUB_ID.fullmatch(name):
        known = ", ".join(reference.MODELS)
        raise FoveateError(f"model={name!r}: must be {known}, a checkpoint folder, or a Hub id such as owner/name")
    return found, found is None and not _on_hub("model", name)


def _unloadable(name: str, error: Exception) -> FoveateError:
    return FoveateError(f"model={name!r}: cannot be loaded as an image-text-to-text model ({_first_line(error)})")


def _clip(name: str, tokenizer: Any, device: str, dtype: str) -> ClipCompanion:
    is_folder = Path(name).is_dir()
    if not is_folder and not _HUB_ID.fullmatch(name):
        raise FoveateError(f"companion={name!r}: must be the folder of a CLIP checkpoint, or a Hub id such as owner/name")
    cached_only = not is_folder and not _on_hub("companion", name)
    return ClipCompanion.load(name, tokenizer, device, _DTYPES[dtype], local_files_only=cached_only)


def _on_hub(parameter: str, name: str) -> bool:
    """Whether the Hub answers for this id; asked once, where loading would ask for every file and try each again."""
    try:
        HfApi().model_info(name, timeout=_HUB_SECONDS)
    except RepositoryNotFoundError as error:
        raise FoveateError(f"{parameter}={name!r}: is no folder here, and no model on the Hub that you may read") from error
    # Whatever else is in the way of the Hub, the model may be in the cache.
    except Exception:
        return False
    return True


def _opening(images: Sequence[Image.Image], prompt: str) -> list[dict[str, Any]]:
    """The messages of a first turn."""
    parts = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": prompt}]
    return [{"role": "user", "content": parts}]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
