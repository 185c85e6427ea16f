"""What the caller hands over beside the pictures: side data, and the memory of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any
from weakref import ReferenceType

from foveate.core.errors import FoveateError
from foveate.core.stream import Memory
from foveate.engine.program import Program
from foveate.engine.seat import Seat
from foveate.engine.side import handed


class Hands:
    """The part of a session that is handed something beside the pictures."""

    reference: ReferenceType[Any]
    _program: Program
    _seat: Seat

    def side(self, **kinds: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Hand over side data with the pictures that this thread encodes inside of the ``with`` block.

        Args:
            kinds: for ``images``, ``videos`` or both, values by name: a list, one for each image (video) of a call, None
                where one has none, or a single value for all.

        Raises:
            FoveateError: if the recipe reads side data, but none of such a name.
        """
        return self._seat.handing(handed(self._program, kinds))

    def streaming(self, memory: Memory) -> AbstractContextManager[None]:
        """Take what this thread encodes inside of the ``with`` block for the next frames of the stream of ``memory``.

        Pictures are frames then, one after the other, and a video is a number of them.

        Args:
            memory: made by the caller, empty at the start of a stream, and handed over again with each block. One thread
                uses it at a time.

        Raises:
            FoveateError: if it holds frames that another session encoded.
        """
        if memory.owner not in (None, self.reference):
            raise FoveateError(
                "memory: holds a stream that another session encoded; use a new Memory(), or memory.reset() for a new stream"
            )
        memory.owner = self.reference
        return self._seat.streaming(memory)
