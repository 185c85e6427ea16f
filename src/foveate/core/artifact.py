"""Learned or calibrated numbers that a method needs, bound to the model they were made on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes

from foveate.core.errors import FoveateError
from foveate.core.files import write_json, write_whole


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact's numbers depend on: the model family and the shape of its language model."""

    family: str
    layers: int
    width: int
    vocabulary: int

    def __str__(self) -> str:
        return f"{self.family} ({self.layers} layers, width {self.width}, vocabulary {self.vocabulary})"


@dataclass(frozen=True)
class Artifact:
    """Numbers and tensors by name, made by ``method`` on the model with ``fingerprint``."""

    method: str
    fingerprint: Fingerprint
    numbers: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read an artifact written by `save`."""
        path = Path(path)
        try:
            content = json.loads(path.read_text())
            numbers = dict(content["numbers"])
            if content.get("tensors"):
                numbers |= load_file(path.with_suffix(".safetensors"))
            return cls(content["method"], Fingerprint(**content["fingerprint"]), numbers)
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            raise FoveateError(f"artifact {str(path)!r}: cannot be read ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, with tensors in a ``.safetensors`` file beside it, each whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.contiguous() for name, value in self.numbers.items() if isinstance(value, torch.Tensor)}
        if tensors:
            write_whole(path.with_suffix(".safetensors"), as_bytes(tensors))
        content = {
            "method": self.method,
            "fingerprint": asdict(self.fingerprint),
            "numbers": {name: value for name, value in self.numbers.items() if name not in tensors},
            "tensors": sorted(tensors),
        }
        write_json(path, content)

    def check(self, fingerprint: Fingerprint) -> None:
        """Refuse a model other than the one the numbers were made on."""
        if fingerprint != self.fingerprint:
            raise FoveateError(
                f"artifact of {self.method}: made on {self.fingerprint}, this model is {fingerprint}; calibrate it again"
            )
