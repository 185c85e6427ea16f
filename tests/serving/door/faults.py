"""What clients do to a server, and a client that does it."""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
import zlib
from typing import Any

from PIL import Image
from tests.serving.door.conftest import CHAT, Reply, animated, chat, encoded, png, url

from foveate import tasks

QUESTION = tasks.questions("attribute", n=1, seed=0)[0]
PICTURE = encoded(QUESTION.image)
INSIDE = "foveate_requests_inside"


def asked(*urls: str, **more: Any) -> dict[str, Any]:
    return chat(*(urls or [url(PICTURE)]), text=QUESTION.prompt, **{"temperature": 0, **more})


def content(reply: Reply) -> str:
    return json.loads(reply.body)["choices"][0]["message"]["content"]


class Client:
    """Talks to a server at a port of this machine."""

    port: int

    def ask(self, body: Any, path: str = CHAT, method: str = "POST") -> Reply:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=300)
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        connection.request(method, path, raw, {"content-type": "application/json"})
        answer = connection.getresponse()
        reply = Reply(answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read())
        connection.close()
        return reply

    def open(self, body: Any) -> socket.socket:
        """A request whose answer is left to wait for."""
        raw = json.dumps(body).encode()
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=120)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(raw)}\r\n\r\n"
        connection.sendall(head.encode() + raw)
        return connection

    def metric(self, name: str, labels: str = "") -> float:
        text = self.ask(b"", "/metrics", "GET").body.decode()
        found = re.search(rf"^{name}{re.escape(labels)} (\S+)$", text, re.MULTILINE)
        return float(found[1]) if found else 0.0

    def idle(self, seconds: float) -> bool:
        """Whether nothing runs or waits any more within so many seconds."""
        until = time.monotonic() + seconds
        while self.metric(INSIDE):
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def answers(self) -> bool:
        """Whether it still does what it is there for."""
        reply = self.ask(asked())
        return reply.status == 200 and content(reply) == QUESTION.answer


BROKEN = {
    "bomb": url(png(50_000, 50_000, zlib.compress(bytes(2**20)))),
    "truncated": url(encoded(Image.effect_noise((96, 96), 50), "JPEG")[:-300]),
    "no picture": url(b"hello"),
    "wrong type": url(PICTURE, "text/html"),
    "file": "file:///etc/hostname",
    "path": "/etc/hostname",
    "relative path": "README.md",
    "ftp": "ftp://example.org/a.png",
    "other host": "https://example.org/a.png",
    "metadata service": "http://169.254.169.254/latest",
}


UNUSUAL = {
    "1x1": url(encoded(Image.new("RGB", (1, 1)))),
    "10000x10": url(encoded(Image.new("RGB", (10_000, 10)))),
    "cmyk": url(encoded(QUESTION.image.convert("CMYK"), "JPEG")),
    "animated": url(animated()),
    "palette": url(encoded(QUESTION.image.convert("P"))),
    "transparent": url(encoded(QUESTION.image.convert("RGBA"))),
    "grey": url(encoded(QUESTION.image.convert("L"))),
    "says jpeg": url(PICTURE, "image/jpeg"),
}


REFUSED: dict[str, Any] = {
    "deep": b'{"messages": ' + b"[" * 10_000 + b"]" * 10_000 + b"}",
    "no JSON": b"\xff\xfe",
    "list": b"[]",
    "no messages": {"temperature": 0},
    "size option": asked(mm_processor_kwargs={"size": {"height": 4000, "width": 4000}}, chat_template_kwargs={"size": 4000}),
    "generation": asked(generation_config='{"num_beams": 1000}'),
    "placeholder": chat(url(PICTURE), text="<image> <image>"),
    "placeholder alone": chat(text="<image>"),
    "long": chat(text="red " * 5000),
    "no text": {"messages": [{"role": "user", "content": [{"type": "text"}]}]},
    "no role": {"messages": [{"content": "a"}]},
    "bias": asked(logit_bias={"x": 1}),
    "temperature": asked(temperature="hot"),
    "no tokens": asked(max_tokens=0),
    "other model": asked(model="gpt2"),
}
