"""Ctrl-C at a place where it counts.

What a signal's handler raises while an object is finalised (in a ``__del__``), Python prints and drops, and goes on. A loop
that lets go of Ray's references all the time is often just there.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Self


class Interrupts:
    """Notes Ctrl-C in the ``with`` block, for the handler that was there before, which `deliver` and the block's end call.

    A second one that comes before the first was delivered goes to that handler at once, as somebody waits for something that
    does not come. Other threads than the main one, which get no signals, and processes that ignore this one, stay as they are.
    """

    def __init__(self) -> None:
        self._noted = False
        self._earlier: object = None

    def __enter__(self) -> Self:
        earlier = signal.getsignal(signal.SIGINT)
        if callable(earlier) and threading.current_thread() is threading.main_thread():
            self._earlier = earlier
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if callable(self._earlier):
            signal.signal(signal.SIGINT, self._earlier)
        if kind is None:
            self.deliver()

    def deliver(self) -> None:
        """Call the earlier handler, which raises KeyboardInterrupt, if Ctrl-C came meanwhile."""
        if self._noted:
            self._noted = False
            self._hand_on(None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._noted:
            self._hand_on(frame)
        self._noted = True

    def _hand_on(self, frame: FrameType | None) -> None:
        if callable(self._earlier):
            self._earlier(signal.SIGINT, frame)
