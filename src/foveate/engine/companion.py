"""CLIP's text tower, beside a model whose vision encoder is CLIP's: the question and the patches in one space."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoTokenizer, CLIPConfig, CLIPModel, CLIPTextModelWithProjection

from foveate.core.errors import FoveateError


class ClipCompanion:
    """A `foveate.core.companion.Companion` for models with a CLIP encoder, such as LLaVA.

    The question is all text behind the last picture, words of the chat template included. However long, it is read whole:
    in segments as long as the text tower's positions (77), of which the last is padded with zeros.
    """

    def __init__(
        self, text: CLIPTextModelWithProjection, text_tokenizer: Any, norm: nn.Module, projection: nn.Module, tokenizer: Any
    ) -> None:
        """Put together from the parts of a CLIP model and the tokenizer of the model that it is to accompany.

        Args:
            text: the text tower with its projection.
            text_tokenizer: CLIP's tokenizer.
            norm: the norm behind CLIP's vision tower (``post_layernorm``).
            projection: CLIP's ``visual_projection``.
            tokenizer: the tokenizer of the vision-language model.
        """
        self._text, self._norm, self._projection = text.eval(), norm, projection
        self._text_tokenizer, self._tokenizer = text_tokenizer, tokenizer

    @classmethod
    def load(
        cls,
        path_or_id: str | Path,
        tokenizer: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        local_files_only: bool = False,
    ) -> ClipCompanion:
        """From the CLIP checkpoint whose vision tower the model has (LLaVA-1.5: openai/clip-vit-large-patch14-336).

        ``tokenizer`` is that of the vision-language model, and ``device`` the one on which it runs.
        """
        named, options = f"companion={str(path_or_id)!r}", {"local_files_only": local_files_only}
        try:
            config = AutoConfig.from_pretrained(path_or_id, **options)
            if not isinstance(config, CLIPConfig):
                raise FoveateError(f"{named}: is a {config.model_type} model; must be a CLIP model with text tower")
            clip = CLIPModel.from_pretrained(path_or_id, config=config, dtype=dtype, **options)
            text_tokenizer = AutoTokenizer.from_pretrained(path_or_id, **options)
        except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise FoveateError(f"{named}: cannot be loaded as a CLIP model ({reason})") from error
        with torch.device("meta"):  # both of its parts are replaced
            text = CLIPTextModelWithProjection(clip.config.text_config)
        text.text_model, text.text_projection = clip.text_model, clip.text_projection
        norm, projection = clip.vision_model.post_layernorm, clip.visual_projection
        return cls(text.to(device), text_tokenizer, norm.to(device), projection.to(device), tokenizer)

    @torch.no_grad()
    def question(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Text embeddings ``[M, d]`` of each sample's M segments, given its token ids ``[n]`` in the model's vocabulary."""
        segments = [self._segments(row) for row in ids]
        whole = {name: torch.cat([each[name] for each in segments]).to(self._text.device) for name in segments[0]}
        embeds: Tensor = self._text(**whole).text_embeds
        return list(embeds.split([len(each["input_ids"]) for each in segments]))

    @torch.no_grad()
    def align(self, features: Tensor) -> Tensor:
        """Features ``[I, n, D]`` of the last CLIP block but one in the same space: ``[I, n, d]``."""
        weight: Tensor = self._norm.weight  # type: ignore[assignment]
        if features.shape[-1] != len(weight):
            raise FoveateError(
                f"companion: is for vision features of width {len(weight)}, this model's have {features.shape[-1]}; "
                "give the CLIP model whose vision tower it has"
            )
        aligned: Tensor = self._projection(self._norm(features.to(weight.dtype)))
        return aligned

    def _segments(self, ids: Tensor) -> dict[str, Tensor]:
        """CLIP's ids and mask ``[M, 77]`` of a question."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        tokens = self._text_tokenizer(text, return_tensors="pt", truncation=False, verbose=False)
        length = self._text.config.max_position_embeddings
        padding = (0, -tokens["input_ids"].shape[1] % length)
        names = ("input_ids", "attention_mask")
        return {name: nn.functional.pad(tokens[name], padding).view(-1, length) for name in names}
