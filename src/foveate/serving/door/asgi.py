"""What goes in and out of a server, and a request that is turned away."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RefusalError(Exception):
    """A request that goes no further.

    Attributes:
        status: of the answer.
        reason: one word, as it is counted.
        message: what the client is told, one line that names what is wrong.
        headers: more of the answer.
    """

    def __init__(self, status: int, reason: str, message: str, headers: tuple[tuple[bytes, bytes], ...] = ()) -> None:
        super().__init__(message)
        self.status, self.reason, self.message, self.headers = status, reason, message, headers

    async def answer(self, send: Send) -> None:
        """Tell the client, in the form of OpenAI's errors."""
        error = {"message": self.message, "type": "invalid_request_error", "param": self.reason, "code": self.status}
        body = json.dumps({"error": error}).encode()
        # The body may not have been read to its end, so nothing can follow on the connection.
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
        headers += [(b"connection", b"close"), *self.headers]
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})
