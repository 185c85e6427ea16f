"""A request's body: read within bounds, then as JSON within bounds."""

from __future__ import annotations

import asyncio
import json
from typing import Any, NoReturn

from foveate.serving.door.asgi import Receive, RefusalError, Scope

DEEPEST = 64
"""Levels of a body; OpenAI's own requests have about ten, tools with JSON schemas a few more."""
MOST_PARTS = 1_000_000
"""Brackets and commas of a body: each may become a Python object of a hundred bytes."""


class HangUpError(Exception):
    """The client is gone."""


async def read(scope: Scope, receive: Receive, most: int, seconds: float) -> bytes:
    """The whole body.

    Raises:
        RefusalError: if it has more than ``most`` bytes (413) or takes more than ``seconds`` (408).
        HangUpError: if the client hangs up.
    """
    for name, value in scope["headers"]:
        if name == b"content-length" and (not value.isdigit() or int(value) > most):
            raise _too_large(most)
        if name == b"content-encoding" and value != b"identity":
            raise RefusalError(415, "encoding", "content-encoding: send the body as it is")
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise HangUpError
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise _too_large(most)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise RefusalError(408, "slow", f"body: did not end within {seconds:g} seconds") from None


def parse(raw: bytes) -> dict[str, Any]:
    """The JSON object that it is.

    Raises:
        RefusalError: if it is none, or one of more levels or parts than any honest request has (400).
    """
    if sum(map(raw.count, (b"[", b"{", b","))) > MOST_PARTS:
        raise RefusalError(400, "json", f"body: has more than {MOST_PARTS} parts")
    try:
        body = json.loads(raw, parse_constant=_no_number)
    except RecursionError:
        raise _too_deep() from None
    except ValueError as error:  # no JSON, no UTF-8, numbers of thousands of digits
        raise RefusalError(400, "json", f"body: is no JSON ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(body, dict):
        raise RefusalError(400, "json", "body: must be a JSON object")
    _refuse_deep(body)
    return body


def _refuse_deep(body: Any) -> None:
    """Level by level, without recursion: what comes behind the door recurses."""
    level = [body]
    for _ in range(DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise _too_deep()


def _too_large(most: int) -> RefusalError:
    return RefusalError(413, "body", f"body: must have at most {most} bytes")


def _too_deep() -> RefusalError:
    return RefusalError(400, "json", f"body: is nested deeper than {DEEPEST} levels")


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")
