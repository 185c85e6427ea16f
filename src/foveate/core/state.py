"""What a method remembers. Methods are frozen; the engine owns one `State` for each session."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from foveate.core.reduction import Reduction
from foveate.core.signal import on

Scope = Literal["prefill", "request", "session"]


class State:
    """Values by scope and key: ``prefill`` ends with the forward, ``request`` with the next empty cache.

    The engine puts ``"seed"`` and ``"traits"`` (the model's `Traits`) into ``session``.
    Entries put with ``rows=True`` are aligned with the sequence (``[B, N, ...]``) and follow every edit of it.
    """

    def __init__(self) -> None:
        self._values: dict[tuple[Scope, str], Any] = {}
        self._rows: set[tuple[Scope, str]] = set()

    def get(self, scope: Scope, key: str, default: Any = None) -> Any:
        """The value under ``key``, or ``default``."""
        return self._values.get((scope, key), default)

    def put(self, scope: Scope, key: str, value: Any, *, rows: bool = False) -> None:
        """Remember ``value``; with ``rows=True`` a tensor ``[B, N, ...]`` whose rows follow the sequence."""
        self._values[scope, key] = value
        (self._rows.add if rows else self._rows.discard)((scope, key))

    def begin(self, scope: Scope) -> None:
        """Forget what belonged to the previous prefill or request."""
        ended = [entry for entry in self._values if entry[0] == scope or (scope == "request" and entry[0] == "prefill")]
        for entry in ended:
            del self._values[entry]
            self._rows.discard(entry)

    def compact(self, reduction: Reduction) -> None:
        """Let every row-aligned entry follow an edit."""
        for entry in self._rows:
            value: Tensor = self._values[entry]
            self._values[entry] = reduction.apply(value.to(reduction.anchor.device))

    def to(self, device: torch.device) -> None:
        """Bring all tensors to ``device``."""
        self._values = {entry: on(value, device) for entry, value in self._values.items()}
