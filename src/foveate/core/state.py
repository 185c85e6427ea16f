"""What a method remembers. Methods are frozen; the engine owns one `State` for each forward."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from foveate.core.reduction import Reduction
from foveate.core.signal import on
from foveate.core.stream import Memory

Scope = Literal["prefill", "session"]


class State:
    """Values by scope and key: ``prefill`` ends with the forward, ``session`` when the recipe is detached.

    The engine puts ``"seed"`` and ``"traits"`` (the model's `Traits`) into ``session``, and what goes on from request to
    request (`foveate.core.exits.Exits.memory`). What is there is shared by all threads, so nothing else there may depend on
    a request. Entries put with ``rows=True`` are aligned with the sequence
    (``[B, N, ...]``) and follow every edit of it.

    Attributes:
        memory: what goes on from frame to frame of the stream that is being encoded; None where none is open, so that each
            video and each picture is alone.
    """

    def __init__(self, session: dict[str, Any] | None = None, memory: Memory | None = None) -> None:
        self.memory = memory
        self._values: dict[Scope, dict[str, Any]] = {"prefill": {}, "session": {} if session is None else session}
        self._rows: set[str] = set()

    def get(self, scope: Scope, key: str, default: Any = None) -> Any:
        """The value under ``key``, or ``default``."""
        return self._values[scope].get(key, default)

    def put(self, scope: Scope, key: str, value: Any, *, rows: bool = False) -> None:
        """Remember ``value``; with ``rows=True`` (``prefill`` only) a tensor ``[B, N, ...]`` that follows the sequence."""
        self._values[scope][key] = value
        if scope == "prefill":
            (self._rows.add if rows else self._rows.discard)(key)

    def compact(self, reduction: Reduction) -> None:
        """Let every row-aligned entry follow an edit."""
        values = self._values["prefill"]
        for key in self._rows:
            value: Tensor = values[key]
            values[key] = reduction.apply(value.to(reduction.anchor.device))

    def to(self, device: torch.device) -> None:
        """Bring all tensors of this forward to ``device``."""
        self._values["prefill"] = {key: on(value, device) for key, value in self._values["prefill"].items()}
