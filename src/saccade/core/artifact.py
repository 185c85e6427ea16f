"""Learned or calibrated numbers that a method needs, bound to the model they were made on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saccade.core.errors import SaccadeError


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
    """Numbers by name, made by ``method`` on the model with ``fingerprint``."""

    method: str
    fingerprint: Fingerprint
    numbers: Mapping[str, Any]

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read an artifact written by `save`."""
        try:
            content = json.loads(Path(path).read_text())
            return cls(content["method"], Fingerprint(**content["fingerprint"]), content["numbers"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SaccadeError(f"artifact {str(path)!r}: cannot be read ({error})") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self), indent=1) + "\n"
        part = path.with_name(path.name + ".part")
        part.write_text(text)
        part.replace(path)

    def check(self, fingerprint: Fingerprint) -> None:
        """Refuse a model other than the one the numbers were made on."""
        if fingerprint != self.fingerprint:
            raise SaccadeError(
                f"artifact of {self.method}: made on {self.fingerprint}, this model is {fingerprint}; calibrate it again"
            )
