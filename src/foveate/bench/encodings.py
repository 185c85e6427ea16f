"""What the encoder made of pictures, kept from cell to cell: those of a task ask about the same ones.

Where no method looks inside, it makes the same of the same pictures. Batches that are timed encode theirs all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Self

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput  # type: ignore[attr-defined]

from foveate.core.signal import on
from foveate.engine.session import Session
from foveate.engine.stand_in import stand_in
from foveate.models import anatomy

ROOM = 2**30
"""Bytes of outputs that are kept at most, in the machine's memory, not on a GPU."""


@dataclass(frozen=True)
class _Kept:
    """An output of the encoder, in the machine's memory."""

    kind: type[ModelOutput]
    fields: dict[str, Any]
    device: torch.device

    @classmethod
    def of(cls, output: ModelOutput) -> Self:
        device = next(_tensors(output.values())).device
        return cls(type(output), on(dict(output), torch.device("cpu")), device)

    def again(self) -> ModelOutput:
        """A new one: methods behind the projector put their own into it."""
        return self.kind(**on(self.fields, self.device))


class Encodings:
    """Stands before a model's encoder and gives again what that made of the same pictures, inside of `serve` only."""

    def __init__(self, model: nn.Module, room: int = ROOM) -> None:
        self._room = room
        self._kept: dict[str, _Kept] = {}
        self._left = room
        self._serving = False
        self._task = ""
        owner: Any = anatomy(model).multimodal
        for name in ("get_image_features", "get_video_features"):
            if hasattr(owner, name):
                stand_in(owner, name, self._features)

    def about(self, task: str) -> bool:
        """Forget what was kept of another task; whether the task is another."""
        anew = task != self._task
        if anew:
            self._task, self._left = task, self._room
            self._kept.clear()
        return anew

    @contextmanager
    def serve(self, session: Session) -> Iterator[None]:
        """Keep and give again while ``session`` runs, unless it looks into the encoder."""
        self._serving = not session.looks_into_encoder
        try:
            yield
        finally:
            self._serving = False

    def _features(self, encode: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self._serving:
            return encode(*args, **kwargs)
        key = _digest(args, kwargs)
        if key not in self._kept:
            output = encode(*args, **kwargs)
            size = sum(tensor.nbytes for tensor in _tensors(output.values()))
            if size <= self._left:
                self._left -= size
                self._kept[key] = _Kept.of(output)
            return output
        return self._kept[key].again()


def _digest(args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    seen = sha256()
    for name, value in [*enumerate(args), *sorted(kwargs.items())]:
        if isinstance(value, Tensor):
            seen.update(f"{name}: {value.dtype} {tuple(value.shape)}".encode())
            seen.update(value.detach().reshape(-1).view(torch.uint8).cpu().numpy().data)
        else:
            seen.update(f"{name}: {value!r}".encode())
    return seen.hexdigest()


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
