"""What the caller hands over beside the pictures: side data, which are frames of a video, and the memory of a stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any
from weakref import ReferenceType

from foveate.core.errors import FoveateError
from foveate.core.stream import Memory
from foveate.engine.films import checked
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
        return self._seat.handing(side=handed(self._program, kinds))

    def films(self, counts: Sequence[int]) -> AbstractContextManager[None]:
        """Take pictures that this thread encodes inside of the ``with`` block for the frames of videos.

        For models that are shown a video as a row of pictures. Methods meet each as one video, as they would meet a real
        one: budgets are of the whole, and those that read time find its frames. The model is called as without.

        Args:
            counts: of a call, how many consecutive pictures make each video, prompt by prompt; 1 = a picture.

        Raises:
            FoveateError: here, if they are no counts; where pictures are encoded, if they are not as many, if those of one
                video differ in their grids or have several; in the prompt, if a video goes on beyond it.
        """
        return self._seat.handing(films=checked(counts))

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
        return self._seat.handing(memory=memory)
