"""A server's answer on its way out: a header more, and a copy of its text where somebody wants to compare it."""

from __future__ import annotations

import json
from typing import Any

from foveate.serving import ticket
from foveate.serving.door.asgi import Message, Send

HEADER = b"x-foveate-tokens"
_LONGEST = 2**20
"""Bytes of an answer that are kept for a comparison."""


class Answer:
    """Sends on what the server says.

    The server's first messages wait until the tokens are noted, which is when the pictures went through: not after the first
    token of the answer, which comes with the second message of a stream. Nothing that a client could use comes earlier.

    Attributes:
        status: None before there is any.
        counts: tokens before and after, once known.
        whole: whether the answer came to its end.
    """

    def __init__(self, send: Send, number: int | None, *, copied: bool = False) -> None:
        self.status: int | None = None
        self.counts: ticket.Counts | None = None
        self.whole = False
        self._send, self._number, self._copied = send, number, copied
        self._held: list[Message] = []
        self._waiting = True
        self._parts: list[bytes] = []
        self._size = 0

    async def __call__(self, message: Message) -> None:
        """The server's next message."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message["type"] == "http.response.body":
            self._copy(message.get("body", b""))
            self.whole = not message.get("more_body", False)
        if not self._waiting:
            return await self._send(message)
        self._held.append(message)
        if self._number is None or ticket.noted(self._number) or self.whole or len(self._held) > 2:
            await self._let_go()

    def close(self) -> ticket.Counts | None:
        """The ticket is given back; the tokens, if any were noted."""
        if self._number is not None:
            number, self._number = self._number, None
            counts = ticket.redeem(number)
            self.counts = counts if counts.before else None
        return self.counts

    async def _let_go(self) -> None:
        self._waiting = False
        counts = self.close()
        for message in self._held:
            if counts is not None and message["type"] == "http.response.start":
                value = f"before={counts.before}, after={counts.after}".encode()
                message = {**message, "headers": [*message.get("headers", []), (HEADER, value)]}
            await self._send(message)
        self._held.clear()

    def _copy(self, body: bytes) -> None:
        self._size += len(body)
        if self._copied and self._size <= _LONGEST:
            self._parts.append(bytes(body))

    def text(self) -> str | None:
        """What the model said, also where it came in pieces; None if it is no answer, or a very long one."""
        if self.status != 200 or not self.whole or self._size > _LONGEST:
            return None
        return said(b"".join(self._parts))


def said(body: bytes) -> str | None:
    """The text of the first choice of an answer, or of a stream of its pieces; None if there is none."""
    try:
        if not body.lstrip().startswith(b"data:"):
            return _text(json.loads(body)["choices"][0]["message"])
        lines = (line[len(b"data:") :].strip() for line in body.splitlines() if line.startswith(b"data:"))
        pieces = [json.loads(line) for line in lines if line != b"[DONE]"]
        return "".join(_text(piece["choices"][0]["delta"]) for piece in pieces if piece.get("choices"))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        return None


def _text(part: dict[str, Any]) -> str:
    return part.get("content") or ""
