"""One request inside: what it asked for, and whether its client is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

from foveate.serving.door.asgi import Message, Receive
from foveate.serving.settings import Keep


@dataclass
class Visit:
    """A request that was let in.

    Attributes:
        keep: what it asked for; None: the recipe's own.
        ticket: its number, under which its tokens are noted (`foveate.serving.ticket`); None where nothing is to note.
        gone: whether the client hung up. Read by the thread that generates, set by the server's.
    """

    keep: Keep | None = None
    ticket: int | None = None
    gone: bool = False


VISIT: ContextVar[Visit] = ContextVar("foveate_visit")
"""The one that is served here; for a server in the door's own process."""


class Inbox:
    """What a server receives in a client's place: the body as the door wrote it, then whether the client hangs up."""

    def __init__(self, body: bytes, receive: Receive | None, left: Callable[[], None]) -> None:
        self._body: bytes | None = body
        self._gone, self._left = asyncio.Event(), left
        # Somebody has to listen, also while the server does not.
        self._listening = asyncio.create_task(self._listen(receive)) if receive is not None else None

    async def __call__(self) -> Message:
        """The next message."""
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _listen(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._left()
        self._gone.set()

    def close(self) -> None:
        """No longer listen."""
        if self._listening is not None:
            self._listening.cancel()
