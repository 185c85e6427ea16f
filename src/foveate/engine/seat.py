"""What each thread is doing with a session."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from foveate.core.layout import Layout
from foveate.core.signal import Seen
from foveate.engine.cache import Owner
from foveate.engine.call import Call
from foveate.engine.films import Beside
from foveate.engine.program import Program
from foveate.engine.recording import Recording


class Seat(threading.local):
    """What one thread is doing with the model, and what it did last."""

    call: Call | None = None
    recording: Recording | None = None
    read: tuple[Layout, Seen] | None = None
    beside = Beside()
    calls: Callable[..., Call] = Call
    """What makes its calls."""

    def begin(self, program: Program, owner: Owner, *, generating: bool = False) -> Call:
        """A new call, which is the current one from now on."""
        self.call = self.calls(program, owner, self.recording, self.beside, generating=generating)
        return self.call

    @contextmanager
    def handing(self, **given: Any) -> Iterator[None]:
        """Hand over what is ``given``, by the names of `Beside`, with what is encoded meanwhile.

        Side data comes beside that of blocks around this one, all else in the place of theirs.
        """
        outer = self.beside
        if "side" in given:
            given["side"] = {kind: {**outer.side.get(kind, {}), **named} for kind, named in given["side"].items()}
        self.beside = replace(outer, **given)
        try:
            yield
        finally:
            self.beside = outer
