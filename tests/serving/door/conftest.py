"""Requests, and a server behind the door that only writes down what it gets."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import zlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from PIL import Image

from foveate.serving import ticket
from foveate.serving.door import Door
from foveate.serving.door.rules import Rules
from foveate.serving.settings import Settings

CHAT = "/v1/chat/completions"
RECIPE = "hiprune(keep=36)"


def encoded(picture: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    """A picture's file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG that says so much of itself and holds ``data``."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def animated() -> bytes:
    frames = [Image.new("RGB", (16, 12), colour) for colour in ("red", "green", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


SMALL = url(encoded(Image.new("RGB", (8, 8), "red")))


def chat(*urls: Any, text: str = "what is it?", **more: Any) -> dict[str, Any]:
    """A request about pictures."""
    parts = [{"type": "image_url", "image_url": {"url": each}} for each in urls]
    return {"messages": [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], **more}


@dataclass
class Behind:
    """A server that answers at once.

    Attributes:
        bodies: what it was asked.
        tokens: what it notes of each request's pictures; None: nothing.
        pieces: its answers, one after the other; the last one stays.
    """

    bodies: list[Any] = field(default_factory=list)
    tokens: tuple[int, int] | None = (576, 64)
    answers: Sequence[str] = ("red",)
    lengths: list[int] = field(default_factory=list)
    doing: Callable[[Any], Awaitable[None]] | None = None

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = json.loads((await receive())["body"] or b"{}") if scope["method"] == "POST" else None
        self.bodies.append(body)
        self.lengths += [int(value) for name, value in scope["headers"] if name == b"content-length"]
        if self.doing is not None:
            await self.doing(receive)
        options = (body or {}).get("mm_processor_kwargs", {})
        if ticket.TICKET in options and self.tokens:
            ticket.note(options[ticket.TICKET], *self.tokens)
        said = self.answers[min(len(self.bodies), len(self.answers)) - 1]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x-own", b"1")]})
        if (body or {}).get("stream"):
            for piece in (said[:1], said[1:]):
                data = json.dumps({"choices": [{"delta": {"content": piece}}]})
                await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        else:
            message = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            await send({"type": "http.response.body", "body": message})


@dataclass
class Reply:
    """What a client sees."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]


async def ask(
    door: Any,
    body: Any,
    *,
    path: str = CHAT,
    method: str = "POST",
    headers: Sequence[tuple[bytes, bytes]] = (),
    sent: Sequence[dict[str, Any]] | None = None,
) -> Reply:
    """One request; ``sent``: the client's messages instead of a whole body."""
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    waiting = [{"type": "http.request", "body": raw}] if sent is None else list(sent)
    messages: list[dict[str, Any]] = []

    async def receive() -> Any:
        if waiting:
            return waiting.pop(0)
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        messages.append(message)

    scope = {"type": "http", "method": method, "path": path, "headers": [(b"content-type", b"application/json"), *headers]}
    await door(scope, receive, send)
    if not messages:
        return Reply(0, {}, b"")
    found = {name.decode(): value.decode() for name, value in messages[0]["headers"]}
    return Reply(messages[0]["status"], found, b"".join(each.get("body", b"") for each in messages[1:]))


def once(door: Any, body: Any, **more: Any) -> Reply:
    return asyncio.run(ask(door, body, **more))


@pytest.fixture
def behind() -> Behind:
    return Behind()


@pytest.fixture
def door(behind: Behind) -> Door:
    return Door(behind, Rules(Settings(RECIPE, min_keep=16, max_keep=0.5)))
