"""The protocol of methods that take part of a frame's way through the encoder from an earlier frame."""

from __future__ import annotations

from abc import abstractmethod

from torch import Tensor

from foveate.core.method import Method
from foveate.core.traits import Traits


class Reuse(Method):
    """Runs encoder blocks for some rows of a frame, and gives the others what a *reference*, an earlier frame, got there.

    A reference runs whole. Of any other frame a block makes keys of all rows; queries, values, output projection and MLP
    only of those that `stale` names. The others have the reference's values, and what its attention and its MLP added, at
    the same place. No row is dropped. One method of a recipe may do so.

    Frames are those of a video, in order, summary rows included; while a stream is open (``Session.streaming``) its count
    goes on from call to call, and pictures are frames, too. Without one, every picture runs whole.
    """

    textual = False

    @abstractmethod
    def reused(self, traits: Traits) -> tuple[int, ...]:
        """Blocks of the encoder in which it acts; none, if its parameters leave it nothing to do."""

    @abstractmethod
    def reference(self, frame: int) -> int:
        """Number of the reference of frame number ``frame`` of a video or stream, ``frame`` itself if it is to run whole.

        It never falls from a frame to the next, and a reference is its own. A frame whose reference is not there (any more)
        runs whole.
        """

    @abstractmethod
    def stale(self, layer: int, keys: Tensor, reference: Tensor) -> Tensor:
        """Rows ``[F, k]`` that run in block ``layer``, each once, given ``keys`` and their references' ``[F, n, D]``."""
