"""What each thread is doing with a session."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from foveate.core.layout import Layout
from foveate.core.signal import Seen
from foveate.core.stream import Memory
from foveate.engine.cache import Owner
from foveate.engine.call import Call
from foveate.engine.program import Program
from foveate.engine.recording import Recording
from foveate.engine.side import Handed


class Seat(threading.local):
    """What one thread is doing with the model, and what it did last."""

    call: Call | None = None
    recording: Recording | None = None
    read: tuple[Layout, Seen] | None = None
    side: Handed = {}  # noqa: RUF012
    memory: Memory | None = None
    calls: Callable[..., Call] = Call
    """What makes its calls."""

    def begin(self, program: Program, owner: Owner, *, generating: bool = False) -> Call:
        """A new call, which is the current one from now on."""
        self.call = self.calls(program, owner, self.recording, self.side, self.memory, generating=generating)
        return self.call

    @contextmanager
    def handing(self, side: Handed) -> Iterator[None]:
        """Hand over ``side`` data with what is encoded meanwhile, beside that of blocks around this one."""
        outer = self.side
        self.side = {kind: {**outer.get(kind, {}), **named} for kind, named in side.items()}
        try:
            yield
        finally:
            self.side = outer

    @contextmanager
    def streaming(self, memory: Memory) -> Iterator[None]:
        """Encode the frames of the stream of ``memory`` meanwhile."""
        outer, self.memory = self.memory, memory
        try:
            yield
        finally:
            self.memory = outer
