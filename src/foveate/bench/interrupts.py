"""Ctrl-C at a place where it counts.

What a signal's handler raises while an object is finalised (in a ``__del__``), Python prints and drops, and goes on. A loop
that lets go of Ray's references all the time is often just there.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupts:
    """Notes Ctrl-C and ``kill`` in the ``with`` block for the handler of before, which `deliver` and the block's end call.

    A second one that comes before the first was delivered goes to that handler at once: somebody waits for what does not
    come. Signals that no function of Python handles, and all in other threads than the main one, stay as they are.
    """

    def __init__(self) -> None:
        self._noted: int | None = None
        self._earlier: dict[int, Callable[[int, FrameType | None], Any]] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                earlier = signal.getsignal(number)
                if callable(earlier):
                    self._earlier[number] = earlier
                    signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, earlier in self._earlier.items():
            signal.signal(number, earlier)
        if kind is None:
            self.deliver()

    def deliver(self) -> None:
        """Call the earlier handler, which mostly raises KeyboardInterrupt, if a signal came meanwhile."""
        number, self._noted = self._noted, None
        if number is not None:
            self._earlier[number](number, None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted is not None:
            self._earlier[number](number, frame)
        self._noted = number
