"""Where the parts of a Hugging Face vision-language model are."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from saccade.core.artifact import Artifact, Fingerprint
from saccade.core.errors import SaccadeError
from saccade.core.method import Traits

Grid = tuple[int, int]
"""Rows and columns of an image's tokens, as the language model sees them."""

ARTIFACTS = "saccade"
"""Folder inside a checkpoint that holds calibrated numbers, one ``<method>.json`` each."""


@dataclass(frozen=True)
class Encoder:
    """The parts of a vision encoder whose signals can be read.

    Attributes:
        attention: the attention module of each block.
        feature_layer: block whose output feeds the projector.
        has_cls: whether row 0 is a CLS token.
        projector: module whose first input is the features.
    """

    attention: Sequence[nn.Module]
    feature_layer: int
    has_cls: bool
    projector: nn.Module


@dataclass(frozen=True)
class Anatomy:
    """A model, taken apart.

    Attributes:
        family: the model family.
        model: the whole, with the language-modelling head.
        multimodal: the module that receives ``input_ids`` and calls the language model with embeddings.
        vision: the vision tower.
        language_model: the stack of decoder layers.
        layers: its decoder layers.
        image_tokens: placeholder ids.
        grids: the token grid of each image, given the keyword arguments and tensors that the vision tower was called with.
        encoder: signals of the encoder, or None where they do not map one to one to the language model's tokens.
        rotary_rows: rows of the rotary positions.
        typed_rotary: whether the rotary module keeps a table for each layer type.
    """

    family: str
    model: nn.Module
    multimodal: nn.Module
    vision: nn.Module
    language_model: nn.Module
    layers: Sequence[nn.Module]
    image_tokens: tuple[int, ...]
    grids: Callable[[tuple[Any, ...], Mapping[str, Any]], list[Grid]]
    encoder: Encoder | None = None
    rotary_rows: int = 1
    typed_rotary: bool = False
    config: Any = field(repr=False, default=None)

    @property
    def kernel(self) -> str:
        """The attention implementation of the language model."""
        return str(self.config._attn_implementation)

    def attention(self, layer: int) -> nn.Module:
        """The attention module of a decoder layer."""
        return self.layers[layer].self_attn  # type: ignore[return-value]

    def rotary(self, layer: int, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of ``layer`` at ``positions`` ``[R, B, n]``."""
        ids = positions[0] if self.rotary_rows == 1 else positions[-3:]
        if self.typed_rotary:
            return self.language_model.rotary_emb(x, ids, self.config.layer_types[layer])  # type: ignore[operator]
        return self.language_model.rotary_emb(x, ids)  # type: ignore[operator]

    def keys_values(self, layer: int, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys (rotated) and values ``[B, Hkv, n, d]`` that the layer makes of its input rows ``x`` ``[B, n, D]``."""
        attention: Any = self.attention(layer)
        normed = self.layers[layer].input_layernorm(x)  # type: ignore[operator]
        shape = (*x.shape[:-1], -1, attention.head_dim)
        key = attention.k_proj(normed).view(shape)
        if hasattr(attention, "k_norm"):
            key = attention.k_norm(key)
        value = attention.v_proj(normed).view(shape).transpose(1, 2)
        key = key.transpose(1, 2)
        rotate = vars(sys.modules[type(attention).__module__])["apply_rotary_pos_emb"]
        _, key = rotate(key[:, :1], key, *rope)  # it rotates queries and keys at once; one head stands in for queries
        return key, value

    def traits(self) -> Traits:
        """What methods may know of the model."""
        fingerprint = Fingerprint(self.family, len(self.layers), self.config.hidden_size, self.config.vocab_size)
        return Traits(
            family=self.family,
            decoder_layers=len(self.layers),
            encoder_layers=len(self.encoder.attention) if self.encoder else None,
            feature_layer=self.encoder.feature_layer if self.encoder else None,
            has_cls=self.encoder is not None and self.encoder.has_cls,
            rotary_rows=self.rotary_rows,
            mask_free="flash" in self.kernel,
            fingerprint=fingerprint,
            artifacts=_artifacts(str(getattr(self.model, "name_or_path", ""))),
        )


def anatomy(model: nn.Module) -> Anatomy:
    """The anatomy of ``model``.

    Raises:
        SaccadeError: if no supported family fits; the message names those that are.
    """
    from saccade.models import gemma3, llava, qwen3_vl

    families = {"llava": llava.anatomy, "gemma3": gemma3.anatomy, "qwen3_vl": qwen3_vl.anatomy}
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    if kind not in families:
        raise SaccadeError(f"model {kind!r}: not supported; supported families: {', '.join(families)}")
    if not hasattr(model, "lm_head"):
        raise SaccadeError(
            f"model {type(model).__name__}: has no language-modelling head; load it with AutoModelForImageTextToText"
        )
    return families[kind](model)


def square_grids(side: int) -> Callable[[tuple[Any, ...], Mapping[str, Any]], list[Grid]]:
    """`Anatomy.grids` of a family that makes ``side * side`` tokens of every image."""

    def grids(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[Grid]:
        pixels: Tensor = kwargs["pixel_values"] if "pixel_values" in kwargs else args[0]
        return [(side, side)] * pixels.shape[0]

    return grids


def _artifacts(folder: str) -> dict[str, Artifact]:
    """Artifacts that lie in a local checkpoint folder; whoever uses one checks that it fits."""
    if not folder or not Path(folder).is_dir():
        return {}
    found = [Artifact.load(path) for path in sorted(Path(folder, ARTIFACTS).glob("*.json"))]
    return {artifact.method: artifact for artifact in found}
