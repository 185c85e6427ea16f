"""A server on transformers with the reference model, and all that clients do to it. It must go on answering."""

from __future__ import annotations

import json
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from tests.serving.door.conftest import CHAT, RECIPE, chat
from tests.serving.door.faults import BROKEN, INSIDE, QUESTION, REFUSED, UNUSUAL, asked, content

# Where vLLM is installed, transformers may be an older one.
pytest.importorskip("transformers.cli.serving.systemone")

from tests.serving.door.fallback import Served

from foveate.serving.door.rules import TRANSFORMERS, Rules
from foveate.serving.settings import Settings

END = 3
"""The token that ends an answer; forbidden, so that answers are long."""


def long(**more: Any) -> dict[str, Any]:
    """A request whose answer takes many seconds."""
    return asked(max_tokens=1800, logit_bias={str(END): -100.0}, **more)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served(Rules(Settings(RECIPE, min_keep=8, max_keep=1.0), behind=TRANSFORMERS, body_seconds=0.5, shadow=1.0))
    assert server.door.shadow is not None
    server.door.shadow.share = 0.0
    yield server
    server.close()


def test_it_answers_and_says_how_many_tokens_there_were(served: Served) -> None:
    whole, pieces = served.ask(asked()), served.ask(asked(stream=True))

    assert content(whole) == QUESTION.answer
    assert json.loads(whole.body)["usage"]["prompt_tokens"] > 144
    assert pieces.headers["content-type"].startswith("text/event-stream")
    assert whole.headers["x-foveate-tokens"] == pieces.headers["x-foveate-tokens"] == "before=144, after=36"


@pytest.mark.parametrize(("keep", "tokens"), [(20, 20), (0.25, 36), (100, 100), (1000, 144), ("full", 144), (1.0, 144)])
def test_a_request_may_ask_for_a_keep_of_its_own(served: Served, keep: Any, tokens: int) -> None:
    reply = served.ask(asked(foveate={"keep": keep}))

    assert (reply.status, reply.headers["x-foveate-tokens"]) == (200, f"before=144, after={tokens}")
    assert served.ask(asked()).headers["x-foveate-tokens"] == "before=144, after=36"


def test_keeps_of_several_clients_do_not_meet(served: Served) -> None:
    keeps = [20, 36, "full", 0.5, 100] * 4

    with ThreadPoolExecutor(8) as pool:
        replies = list(pool.map(lambda keep: served.ask(asked(foveate={"keep": keep}, stream=keep == 20)), keeps))

    found = [int(reply.headers["x-foveate-tokens"].rpartition("=")[2]) for reply in replies]
    assert found == [20, 36, 144, 72, 100] * 4


@pytest.mark.parametrize("stream", [False, True])
def test_a_keep_that_is_too_little_for_the_picture_is_refused_before_the_answer_begins(served: Served, stream: bool) -> None:
    reply = served.ask(asked(foveate={"keep": 0.05}, stream=stream))

    assert reply.status == 400
    assert "7 of this picture's 144 tokens, but this server allows 8 to 144" in reply.error["message"]


def test_the_client_s_library_gets_on_with_it(served: Served) -> None:
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key="none", max_retries=0)
    (model,) = client.models.list().data
    more: Any = {"model": model.id, "messages": asked()["messages"], "temperature": 0}
    more["extra_body"] = {"foveate": {"keep": 64}}

    assert client.chat.completions.create(**more).choices[0].message.content == QUESTION.answer
    pieces = client.chat.completions.create(**more, stream=True)
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == QUESTION.answer
    with pytest.raises(openai.BadRequestError, match="keep=0"):
        client.chat.completions.create(**more | {"extra_body": {"foveate": {"keep": 0}}})


def test_answers_are_compared_and_counted(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.door.shadow, "share", 1.0)
    labels = f'{{recipe="{RECIPE}"}}'
    names = ("visual_tokens_before_total", "visual_tokens_after_total", "shadow_answers_total", "shadow_equal_answers_total")

    def now() -> list[float]:
        return [served.metric(f"foveate_{name}", labels) for name in names]

    before = now()
    for number in range(3):
        served.ask(asked())
        until = time.monotonic() + 60
        while now()[2] - before[2] <= number and time.monotonic() < until:
            time.sleep(0.02)

    assert [new - old for new, old in zip(now(), before)] == [3 * 144, 3 * 36, 3, 3]


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused(served: Served, name: str) -> None:
    reply = served.ask(asked(BROKEN[name]))

    assert reply.status == 400
    assert "messages[0].content[0]" in reply.error["message"]
    assert served.answers()


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_pictures(served: Served, name: str) -> None:
    reply = served.ask(asked(UNUSUAL[name]))

    assert (reply.status, reply.headers["x-foveate-tokens"]) == (200, "before=144, after=36")


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_requests_that_are_none_are_refused(served: Served, name: str, stream: bool) -> None:
    body = REFUSED[name]
    if isinstance(body, dict):
        body = body | {"stream": stream}
    reply = served.ask(body)

    assert reply.status == 400 or (stream and b'"error"' in reply.body), reply
    assert served.answers()


def test_options_of_processors_are_dropped(served: Served) -> None:
    reply = served.ask(asked(mm_processor_kwargs={"size": {"height": 4000, "width": 4000}}, media_io_kwargs={"image": {}}))

    assert (reply.status, content(reply)) == (200, QUESTION.answer)


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/responses", "/v1/completions", "/v1/audio/transcriptions"])
def test_transformers_other_doors_are_closed(served: Served, path: str) -> None:
    assert served.ask({"model": "gpt2"}, path).status == 404
    assert served.answers()


def test_a_body_that_never_ends(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())

        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")
        assert connection.recv(1000).endswith(b"}") or connection.recv(1) == b""
    assert served.answers()


def test_a_body_that_is_too_large(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{{".encode())

        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")
    assert served.answers()


def test_sixty_four_clients_at_once(served: Served) -> None:
    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(lambda number: served.ask(asked(stream=number % 2 == 0)), range(64)))

    assert {reply.status for reply in replies} == {200}
    assert {content(reply) for reply in replies[1::2]} == {QUESTION.answer}
    assert served.idle(60)


@pytest.mark.parametrize("stream", [True, False])
def test_clients_that_hang_up_free_what_they_asked_for(served: Served, stream: bool) -> None:
    clients = [served.open(long(stream=stream))]
    if stream:
        assert clients[0].recv(1000).startswith(b"HTTP/1.1 200 ")
    clients += [served.open(long(stream=stream)) for _ in range(3)]
    until = time.monotonic() + 60
    while served.metric(INSIDE) < 4 and time.monotonic() < until:
        time.sleep(0.02)
    assert served.metric(INSIDE) == 4
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    assert served.idle(60)
    assert served.answers()


def test_an_answer_ends_where_the_model_s_context_does(served: Served) -> None:
    short = served.ask(chat(text="red " * 2040, temperature=0, max_tokens=100_000, logit_bias={str(END): -100.0}))

    assert (short.status, json.loads(short.body)["usage"]["total_tokens"]) == (200, 2048)


def test_health_needs_no_answer_of_the_model(served: Served) -> None:
    client = served.open(long())
    time.sleep(0.2)

    assert served.ask(b"", "/health", "GET").status == 200
    client.close()
    assert served.idle(60)


def test_nobody_waits_while_a_request_is_read(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, plain = threading.Event(), threading.Event(), served.loaded.processor.apply_chat_template

    def read(*args: Any, **kwargs: Any) -> Any:
        begun.set()
        assert go_on.wait(60)
        return plain(*args, **kwargs)

    monkeypatch.setattr(served.loaded.processor, "apply_chat_template", read)
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(served.ask, asked())
        assert begun.wait(60)
        assert served.ask(b"", "/health", "GET").status == 200
        assert not reply.done()
        go_on.set()
        assert content(reply.result()) == QUESTION.answer
