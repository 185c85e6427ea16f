"""What is remembered of a stream of frames that comes in several calls of the encoder."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor


class Memory:
    """What methods remember of one stream, by method and key: earlier frames' keys, a running mean.

    The caller owns it and hands it over with each call that encodes the stream's next frames (``Session.streaming``).
    Values are replaced, never changed in place: a call that fails leaves those of before.

    Attributes:
        owner: whose stream it is, so that another model's is refused.
    """

    def __init__(self) -> None:
        self.owner: object | None = None
        self._values: dict[tuple[Hashable, Hashable], Any] = {}

    def get(self, method: Hashable, key: Hashable, default: Any = None) -> Any:
        """What ``method`` put under ``key``, or ``default``."""
        return self._values.get((method, key), default)

    def put(self, method: Hashable, key: Hashable, value: Any) -> None:
        """Remember ``value`` in the place of what ``method`` put under ``key`` before."""
        self._values[method, key] = value

    def reset(self) -> None:
        """Forget everything: the next frame is the first of a new stream."""
        self.owner = None
        self._values = {}

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors in it."""
        return _bytes(list(self._values.values()))

    def draft(self) -> Memory:
        """A copy to write in while a call goes on."""
        copy = Memory()
        copy.owner, copy._values = self.owner, dict(self._values)
        return copy

    def take(self, draft: Memory) -> None:
        """The call of a `draft` went well: what it wrote counts, and the draft holds nothing any more."""
        self._values, draft._values = draft._values, {}


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    if isinstance(value, Mapping):
        value = list(value.values())
    return sum(map(_bytes, value)) if isinstance(value, list | tuple) else 0
