"""Learned or calibrated numbers that a method needs, bound to the model they were made on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as as_bytes

from foveate.core import hub
from foveate.core.errors import FoveateError
from foveate.core.files import as_json, write_whole

SIZE = "size"
"""What quantized weights take, among their numbers; no others have that."""
FOLDER = "foveate"
"""Folder inside a checkpoint that holds calibrated numbers, one ``<method>.json`` each."""

CLOSE = 2**-8
"""Weights are the same up to this share of their size, twice what bfloat16 rounds by ..."""
TINY = 1e-7
"""... or up to this much, float16's smallest steps."""


@dataclass(frozen=True)
class Fingerprint:
    """What an artifact's numbers depend on: the model family, the shape of its language model, and its weights.

    Equal where family and shape are; `unlike` compares the weights, which are not the same to the last bit in every dtype.

    Attributes:
        family: the model family.
        layers: of the language model.
        width: of its hidden states.
        vocabulary: rows of its embedding.
        weights: a few entries of each parameter, by its name; none where they cannot be read (offloaded, quantized).
    """

    family: str
    layers: int
    width: int
    vocabulary: int
    weights: Mapping[str, tuple[float, ...]] = field(default_factory=dict, compare=False, repr=False)

    def unlike(self, other: Fingerprint) -> str | None:
        """A parameter of ``other`` whose weights differ from these, or that is not among these; None if there is none.

        Nothing is compared where either cannot be read. One that ``other`` lacks counts as such: quantized models may hold
        it in another form, under another name.
        """
        for name, theirs in other.weights.items():
            ours = self.weights.get(name)
            if theirs and (ours is None or (ours and not _alike(ours, theirs))):
                return name
        return None

    def __str__(self) -> str:
        return f"{self.family} ({self.layers} layers, width {self.width}, vocabulary {self.vocabulary})"


@dataclass(frozen=True)
class Artifact:
    """Numbers and tensors by name, made by ``method`` with ``parameters`` on the model with ``fingerprint``.

    ``parameters`` are those of the method that the numbers depend on (`foveate.core.method.Offline.bound`). ``files`` are
    what is too large to be read at once, by name: in a folder of the method's name, beside the file of the numbers.
    """

    method: str
    fingerprint: Fingerprint
    numbers: Mapping[str, Any]
    parameters: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, Path] = field(default_factory=dict)

    @classmethod
    def load(cls, path: str | Path) -> Artifact:
        """Read an artifact written by `save`."""
        path = Path(path)
        try:
            content = json.loads(path.read_text())
            numbers = dict(content["numbers"])
            if content.get("tensors"):
                numbers |= load_file(path.with_suffix(".safetensors"))
            weights = {name: tuple(map(float, text.split())) for name, text in content.get("weights", {}).items()}
            fingerprint = Fingerprint(**content["fingerprint"], weights=weights)
            files = {name: path.with_suffix("") / name for name in content.get("files", ())}
            return cls(content["method"], fingerprint, numbers, content.get("parameters", {}), files)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise FoveateError(f"artifact {str(path)!r}: cannot be read ({error})") from error

    @classmethod
    def all_in(cls, folder: str | Path) -> list[Artifact]:
        """Those in a folder.

        Raises:
            FoveateError: if there is no such folder, or none in it, or one that cannot be read.
        """
        if not Path(folder).is_dir():
            raise FoveateError(
                f"artifacts={str(folder)!r}: no such folder; name the one that foveate calibrate or quantize wrote"
            )
        found = [cls.load(path) for path in sorted(Path(folder).glob("*.json"))]
        if not found:
            raise FoveateError(
                f"artifacts={str(folder)!r}: holds none; name the folder that foveate calibrate or quantize wrote"
            )
        return found

    @classmethod
    def from_hub(cls, repo: str, method: str, *, revision: str | None = None, token: str | bool | None = None) -> Artifact:
        """The numbers of ``method`` that lie in the folder ``foveate`` of a repository on the Hub.

        Args:
            repo: its name, ``"user/name"``; often the checkpoint's own.
            method: the method's name.
            revision: branch, tag or commit; the main branch if None.
            token: of the Hub; the one that is logged in if None.

        Raises:
            FoveateError: if it cannot be fetched or read.
        """
        path = hub.fetch(repo, f"{FOLDER}/{method}.json", revision, token)
        try:
            content = json.loads(path.read_text())
            tensors, files = bool(content.get("tensors")), list(content.get("files", ()))
        except (ValueError, AttributeError, TypeError) as error:
            raise FoveateError(f"artifact {method!r} of {repo!r}: is no JSON object ({error})") from error
        for name in files:
            hub.fetch(repo, f"{FOLDER}/{method}/{name}", revision, token)
        if tensors:
            hub.fetch(repo, f"{FOLDER}/{method}.safetensors", revision, token)
        return cls.load(path)

    def push_to_hub(self, repo: str, *, private: bool | None = None, token: str | None = None) -> str:
        """Write the numbers into the folder ``foveate`` of a repository on the Hub, with a card where it has none.

        Args:
            repo: its name, ``"user/name"``; often the checkpoint's own. It is made if it is not there.
            private: whether only you may see a repository that is made; the account's default if None.
            token: of the Hub; the one that is logged in if None.

        Returns:
            The address of the commit.

        Raises:
            FoveateError: if the Hub refuses or cannot be reached.
        """
        files = {f"{FOLDER}/{self.method}/{name}": path.read_bytes() for name, path in self.files.items()}
        files |= {f"{FOLDER}/{self.method}{suffix}": content for suffix, content in self._files().items()}
        card = _CARD.format(repo=repo, method=self.method, model=self.fingerprint)
        return hub.push(repo, files, card, f"Numbers of {self.method} for {self.fingerprint.family}", private, token)

    def save(self, path: str | Path) -> None:
        """Write as JSON, tensors in a ``.safetensors`` file and files in a folder beside it, each whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        for name, source in self.files.items():
            target = path.with_suffix("") / name
            if not (target.exists() and target.samefile(source)):
                target.parent.mkdir(exist_ok=True)
                write_whole(target, source.read_bytes())
        for suffix, content in self._files().items():
            write_whole(path.with_suffix(suffix), content)

    def _files(self) -> dict[str, bytes]:
        """Content by suffix, the tensors first."""
        tensors = {name: value.contiguous() for name, value in self.numbers.items() if isinstance(value, torch.Tensor)}
        fingerprint = asdict(self.fingerprint)
        weights = fingerprint.pop("weights")
        content = {
            "method": self.method,
            "parameters": dict(self.parameters),
            "fingerprint": fingerprint,
            # A line for each parameter; six digits are more than the comparison needs.
            "weights": {name: " ".join(f"{entry:.6g}" for entry in entries) for name, entries in weights.items()},
            "numbers": {name: value for name, value in self.numbers.items() if name not in tensors},
            "tensors": sorted(tensors),
        } | ({"files": sorted(self.files)} if self.files else {})
        return ({".safetensors": as_bytes(tensors)} if tensors else {}) | {".json": as_json(content)}

    def check(self, fingerprint: Fingerprint, parameters: Mapping[str, Any]) -> None:
        """Refuse a model, or parameters of the method, other than those that the numbers were made with."""
        again = f"{'quantize' if SIZE in self.numbers else 'calibrate'} it again"
        if fingerprint != self.fingerprint:
            raise FoveateError(
                f"artifact of {self.method}: made on {self.fingerprint}, this model is {fingerprint}; {again}"
            )
        if fingerprint.weights and not self.fingerprint.weights:
            raise FoveateError(
                f"artifact of {self.method}: does not say on which weights it was made, as artifacts once did not; {again}"
            )
        other = self.fingerprint.unlike(fingerprint)
        if other is not None:
            known = other in self.fingerprint.weights
            raise FoveateError(
                f"artifact of {self.method}: made on other weights than this model's, as {other} shows; {again}"
                if known
                else f"artifact of {self.method}: made on a model without {other}; merge adapters, or {again}"
            )
        for name, value in parameters.items():
            made = self.parameters.get(name, "unknown")
            if made != value:
                raise FoveateError(
                    f"artifact of {self.method}: made with {name}={made!r}; use that, or {again} with {name}={value!r}"
                )


_CARD = """\
# Numbers for Foveate

`foveate/` holds what `{method}` needs to run on {model}.

```python
import foveate

numbers = foveate.Artifact.from_hub("{repo}", "{method}")
with foveate.attach(model, "{method}", artifacts=[numbers]):
    out = model.generate(**inputs)
```
"""


def _alike(ours: tuple[float, ...], theirs: tuple[float, ...]) -> bool:
    return len(ours) == len(theirs) and all(
        math.isclose(a, b, rel_tol=CLOSE, abs_tol=TINY) for a, b in zip(ours, theirs, strict=True)
    )
