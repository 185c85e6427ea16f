"""The protocol of early exit: rows that predict a token leave before the last decoder layer."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from foveate.core.method import Method
from foveate.core.signal import Seen
from foveate.core.state import State
from foveate.core.traits import Traits


@dataclass(frozen=True)
class Leaving:
    """Rows that leave before a decoder layer.

    Attributes:
        leaves: ``[B, Q]`` bool.
        rows: ``[B, Q, D]`` what leaves the last layer in their place, before the final norm; read where they leave.
    """

    leaves: Tensor
    rows: Tensor


class Exits(Method):
    """Lets the rows that predict a token leave before the last layer: they are routed through all, unless it says so here.

    Asked in every forward that predicts: the prompt's (for its last row, which decides for all of its rows) and each step of
    decoding; rows of an answer that comes with its prompt decide each for itself (and run on where attention takes no mask).
    Candidates that ``generate`` tries out run on. What has left runs through no layer; its keys and values in the layers
    behind are made of the state that it left with (and what the model adds to visual rows in its first layers), by each
    layer's own norm and projections. Once all samples of a batch have left, no layer runs; until then, those that left are
    padding. The host waits for the device once at each exit.
    """

    @abstractmethod
    def exits(self, traits: Traits) -> tuple[int, ...]:
        """Decoder layers before which rows may leave, ascending, none of them the first; () = nobody ever leaves."""

    @abstractmethod
    def leave(self, layer: int, x: Tensor, asked: Tensor, seen: Seen, state: State) -> Leaving:
        """Which of the rows ``x`` ``[B, Q, D]`` that would enter decoder layer ``layer`` leave instead.

        ``asked`` ``[B, Q]`` (bool): those that are there and have not left before.
        """

    def ended(self, x: Tensor, stayed: Tensor, asked: Tensor, seen: Seen, state: State) -> None:
        """The last layer is done: of the rows ``x`` ``[B, Q, D]``, before the final norm, ``stayed`` have run through all.

        ``asked`` ``[B, Q]`` (bool): those that are there. Not called where a forward fails.
        """

    def memory(self, traits: Traits) -> Any:
        """What goes on from request to request, in `State` under the method's name (scope ``session``).

        All threads share it, so it has to guard itself. None = nothing.
        """
        return None
