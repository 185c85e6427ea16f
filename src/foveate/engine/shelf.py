"""Where quantized blocks are kept: a file for each, in a folder beside the artifact, or in memory."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes
from torch import Tensor

from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable, write_json, write_whole
from foveate.core.weights import Replaced, Weights
from foveate.engine.linears import read_back
from foveate.models import Anatomy

STATE = "run.json"
"""What a run that is not finished was started with, in its folder."""


class Shelf:
    """Where blocks are kept: in a folder, or in memory."""

    def __init__(self, out: Path | None, name: str) -> None:
        self._out, self._folder = out, None if out is None else out / name
        self._name = name
        self._held: dict[int, dict[str, Tensor]] = {}

    def start(self, started: Mapping[str, Any]) -> None:
        """Begin, or go on with what was started alike."""
        if self._out is None or self._folder is None:
            return
        make_writable(self._folder)
        state, plain = self._folder / STATE, json.loads(json.dumps(started))
        try:
            same = json.loads(state.read_text()) == plain
        except (OSError, ValueError):
            same = False
        if not same:
            # The artifact first: what is left of it must never be taken for whole.
            (self._out / f"{self._name}.json").unlink(missing_ok=True)
            for path in self._folder.glob("block-*.safetensors"):
                path.unlink()
            write_json(state, plain)

    def read(self, number: int) -> dict[str, Replaced] | None:
        """What stands for the linears of a block; None where it is not there yet."""
        if self._folder is None:
            return grouped(self._held[number]) if number in self._held else None
        path = self._folder / file_of(number)
        if not path.exists():
            return None
        try:
            return grouped(load_file(path))
        except (OSError, SafetensorError) as error:
            raise FoveateError(f"out={str(self._out)!r}: {path.name} cannot be read ({error}); delete it") from error

    def write(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Keep a block."""
        if self._folder is None:
            self._held[number] = tensors
        else:
            write_whole(self._folder / file_of(number), as_bytes(tensors))

    def finish(self, method: Weights, parts: Anatomy, content: dict[str, Any]) -> Artifact:
        """The artifact of all blocks."""
        fingerprint = parts.traits().fingerprint
        if self._out is None:
            held = {f"{number}.{name}": t for number, block in self._held.items() for name, t in block.items()}
            return method.artifact(fingerprint, content | held)
        assert self._folder is not None
        files = {file_of(number): self._folder / file_of(number) for number in range(content["blocks"])}
        artifact = method.artifact(fingerprint, content, files)
        artifact.save(self._out / f"{self._name}.json")
        return artifact


def grouped(tensors: Mapping[str, Tensor]) -> dict[str, Replaced]:
    """What stands for the linears of a block, by name."""
    names = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {
        name: read_back({key.rpartition(".")[2]: value for key, value in tensors.items() if key.rpartition(".")[0] == name})
        for name in names
    }


def file_of(number: int) -> str:
    """The file of a block."""
    return f"block-{number:02}.safetensors"


def block_of(artifact: Artifact, number: int) -> dict[str, Replaced]:
    """What stands for the linears of block ``number``, by name within it.

    Raises:
        FoveateError: if its file cannot be read.
    """
    if not artifact.files:
        begin = f"{number}."
        return grouped({k.removeprefix(begin): v for k, v in artifact.numbers.items() if k.startswith(begin)})
    path = artifact.files[file_of(number)]
    try:
        return grouped(load_file(path))
    except (OSError, SafetensorError) as error:
        raise FoveateError(f"artifact {str(path)!r}: cannot be read ({error}); run foveate quantize again") from error
