"""What is sent to a server, and what becomes of rows when it refuses, is busy, or goes away."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.serving.batch.conftest import Write

from foveate.core.errors import FoveateError
from foveate.serving import on_server
from foveate.serving.asked import read
from foveate.serving.on_server import OnServer, ServerAnswers, address, data_url, served


class Served(ThreadingHTTPServer):
    """A server that repeats the last text it is sent; ``plan``: (status, headers) of the next answers, then 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answering)
        self.models = ["tiny"]
        self.plan: list[tuple[int, dict[str, str]]] = []
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    def handle_error(self, *arguments: Any) -> None:
        """A client that no longer waits is none."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Answering(BaseHTTPRequestHandler):
    server: Served

    def do_GET(self) -> None:
        self._say(200, {"data": [{"id": name} for name in self.server.models]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append(body)
        self.server.keys.append(self.headers.get("Authorization"))
        text = body["messages"][-1]["content"][-1]["text"]
        time.sleep(0.5 * (text == "slow"))
        status, headers = (
            self.server.plan.pop(0) if self.server.plan else (200, {"x-foveate-tokens": "before=576, after=64"})
        )
        said = {"choices": [{"message": {"content": f"so: {text}"}}]} if status == 200 else {"error": "not now"}
        self._say(status, said, headers)

    def _say(self, status: int, said: Any, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(said).encode()
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Served]:
    with Served() as found:
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def waited() -> list[float]:
    return []


def asking(server: Served, waited: list[float], **more: Any) -> ServerAnswers:
    return ServerAnswers(replace(OnServer(server.url, "tiny"), **more), waited.append)


def test_each_row_is_asked_with_its_pictures(server: Served, waited: list[float], write: Write) -> None:
    rows = list(read(write([{"id": 1}, {"id": 2, "image": ["grey.png", "grey.png"], "max_new_tokens": 3}]), 64))

    first, second = asking(server, waited, keep=0.25, system="Be brief.", key="mine")(rows)

    assert (first.id, first.answer, first.before, first.after, first.error) == (1, "so: what?", 576, 64, None)
    assert second.answer == "so: what?"
    body = next(body for body in server.bodies if body["max_tokens"] == 3)
    assert (body["model"], body["temperature"], body["foveate"]) == ("tiny", 0, {"keep": 0.25})
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}
    assert [part["type"] for part in body["messages"][1]["content"]] == ["image_url", "image_url", "text"]
    assert server.keys == ["Bearer mine"] * 2


def test_a_conversation_sends_pictures_once_and_what_was_said(server: Served, waited: list[float], write: Write) -> None:
    (found,) = asking(server, waited)(list(read(write([{"id": 1, "question": ["one?", "two?"]}]), 64)))

    assert found.answer == ["so: one?", "so: two?"]
    user, assistant, again = server.bodies[1]["messages"]
    assert [part["type"] for part in user["content"]] == ["image_url", "text"]
    assert assistant == {"role": "assistant", "content": "so: one?"}
    assert again["content"] == [{"type": "text", "text": "two?"}]
    assert "foveate" not in server.bodies[0]


def test_a_busy_server_is_asked_again_when_it_says(server: Served, waited: list[float], write: Write) -> None:
    server.plan = [(429, {"Retry-After": "7"}), (503, {}), (500, {"Retry-After": "soon"})]

    (found,) = asking(server, waited)(list(read(write([{"id": 1}]), 64)))

    assert (found.answer, found.before) == ("so: what?", 576)
    assert waited == [7.0, 2.0, 4.0]


def test_trouble_that_lasts_is_a_failure_of_the_row(server: Served, waited: list[float], write: Write) -> None:
    server.plan = [(500, {})] * 3

    (found,) = asking(server, waited, tries=3)(list(read(write([{"id": 1}]), 64)))

    assert (found.error, found.gone) == ('server: 500 Internal Server Error: {"error": "not now"}', False)
    assert waited == [1.0, 2.0]


def test_what_is_refused_is_not_sent_again(server: Served, waited: list[float], write: Write) -> None:
    rows = list(read(write([{"id": 1}, {"id": 2, "image": "nowhere.png"}]), 64))
    server.plan = [(400, {})]

    refused, missing = asking(server, waited)(rows)

    assert refused.error.startswith("server: 400 Bad Request")
    assert missing.error.endswith("nowhere.png': no such file")
    assert (len(server.bodies), waited) == (1, [])


def test_a_server_that_is_gone_is_said_to_be(server: Served, waited: list[float], write: Write) -> None:
    rows = list(read(write([{"id": 1}]), 64))
    asked = asking(server, waited, url="http://127.0.0.1:1")

    (found,) = asked(rows)

    assert found.gone
    assert "server: nobody answers, tried 6 times (" in found.error
    assert waited == [1.0, 2.0, 4.0, 8.0, 16.0]


def test_an_answer_that_does_not_come_is_a_failure_of_the_row(
    server: Served, waited: list[float], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(on_server, "_SECONDS", 0.1)

    (found,) = asking(server, waited)(list(read(write([{"id": 1, "question": "slow"}]), 64)))

    assert (found.error, found.gone, waited) == ("server: took longer than 0.1 s", False, [])


def test_an_answer_without_a_message_is_a_failure(server: Served, waited: list[float], write: Write) -> None:
    (found,) = asking(server, waited, url=f"{server.url}/v1")(list(read(write([{"id": 1}]), 64)))
    assert found.answer == "so: what?"

    server.plan = [(201, {})]
    (found,) = asking(server, waited)(list(read(write([{"id": 1}]), 64)))
    assert found.error.startswith("server: answered without a message")


def test_the_model_is_the_only_one_or_the_one_that_is_named(server: Served) -> None:
    assert served(server.url, None) == "tiny"
    server.models = ["tiny", "large"]
    assert served(f"{server.url}/v1/", "large") == "large"
    for wanted in (None, "huge"):
        with pytest.raises(FoveateError, match="the server has 'tiny', 'large'; name one of them"):
            served(server.url, wanted)


def test_a_server_that_is_not_there_or_no_server_is_refused_at_once() -> None:
    with pytest.raises(FoveateError, match=r"^server='http://127.0.0.1:1': nobody answers .*start it"):
        served("http://127.0.0.1:1", None)
    for url in ("localhost:8000", "ftp://a", "http://", "http:// a"):
        with pytest.raises(FoveateError, match="must be an address such as http://localhost:8000"):
            address(url)


def test_files_that_all_servers_show_alike_are_sent_as_they_are(tmp_path: Path) -> None:
    plain, turned, cmyk, clear = (tmp_path / name for name in ("plain.jpg", "turned.jpg", "cmyk.jpg", "clear.png"))
    picture = Image.linear_gradient("L").resize((8, 4)).convert("RGB")
    picture.save(plain)
    orientation = Image.Exif()
    orientation[0x0112] = 6
    picture.save(turned, exif=orientation)
    picture.convert("CMYK").save(cmyk)
    picture.convert("RGBA").save(clear)

    def sent(source: Any) -> tuple[str, bytes]:
        kind, _, text = data_url(source).partition(";base64,")
        return kind, base64.b64decode(text)

    assert sent(plain) == sent(plain.read_bytes()) == ("data:image/jpeg", plain.read_bytes())
    for path, size in ((turned, (4, 8)), (cmyk, (8, 4)), (clear, (8, 4))):
        kind, content = sent(path)
        shown = Image.open(BytesIO(content))
        assert (kind, shown.format, shown.mode, shown.size) == ("data:image/png", "PNG", "RGB", size)
    (tmp_path / "torn.jpg").write_bytes(plain.read_bytes()[:200])
    with pytest.raises(FoveateError, match="is not a picture that can be read"):
        data_url(tmp_path / "torn.jpg")
