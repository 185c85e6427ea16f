"""`foveate serve` on vLLM with the reference model, and all that clients do to it. Run by ``make test-serving``."""

from __future__ import annotations

import os
import shlex
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm")

from tests.serving.batch.file import ask_server
from tests.serving.door.conftest import CHAT, RECIPE
from tests.serving.door.faults import BROKEN, QUESTION, REFUSED, UNUSUAL, Client, asked, content

COMMAND = f"foveate serve reference --engine vllm --recipe '{RECIPE}' --min-keep 8 --max-keep 1.0 --shadow 1.0"
OF_VLLM = "--dtype float32 --enforce-eager --max-model-len 1024 --max-num-seqs 16"
STARTED = 600.0
"""Seconds that an engine may take on a busy machine."""
PASSES = {"generation", "placeholder", "placeholder alone", "size option"}
"""What vLLM guards against itself, or takes as words."""
RUNNING = "vllm:num_requests_running"


class Served(Client):
    """The command in a process of its own."""

    def __init__(self, command: str = COMMAND) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        words = shlex.split(f"{command} --port {self.port} -- {OF_VLLM}")
        known = {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        self.process = subprocess.Popen([sys.executable, "-m", *words], env=known | os.environ | {"HF_HUB_OFFLINE": "1"})
        until = time.monotonic() + STARTED
        while True:
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server does not start"
            try:
                if self.ask(b"", "/health", "GET").status == 200:
                    return
            except OSError:
                time.sleep(0.5)

    def running(self) -> float:
        """Requests in the engine."""
        text = self.ask(b"", "/metrics", "GET").body.decode()
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(RUNNING))

    def answers(self) -> bool:
        reply = self.ask(asked())
        return reply.status == 200 and content(reply).strip() == QUESTION.answer

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    server = Served()
    yield server
    server.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("keep", "tokens"), [(None, 36), (64, 64), (1000, 144), (0.25, 36), (1.0, 144), ("full", 144)])
def test_tokens_are_in_the_header(served: Served, keep: Any, tokens: int, stream: bool) -> None:
    wish = {} if keep is None else {"foveate": {"keep": keep}}
    reply = served.ask(asked(**wish, stream=stream))

    assert (reply.status, reply.headers["x-foveate-tokens"]) == (200, f"before=144, after={tokens}")


def test_the_processor_checks_the_bounds_again(served: Served) -> None:
    reply = served.ask(asked(foveate={"keep": 0.05}))

    assert reply.status == 400
    assert "7 of this picture's 144 tokens, but this server allows 8 to 144" in reply.error["message"]
    assert served.ask(asked(foveate={"keep": 7})).error["param"] == "keep"


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_no_picture_is_refused(served: Served, name: str) -> None:
    assert served.ask(asked(BROKEN[name])).status == 400


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_pictures_are_pictures(served: Served, name: str) -> None:
    assert served.ask(asked(UNUSUAL[name])).headers["x-foveate-tokens"] == "before=144, after=36"


def part(**part: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": [part, {"type": "text", "text": QUESTION.prompt}]}]}


ALSO_REFUSED = {
    "embeddings": part(type="image_embeds", image_embeds="AAAA"),
    "a name for a picture that never came": part(type="image_url", image_url=None, uuid="unknown"),
    "seventeen pictures": asked(*[UNUSUAL["1x1"]] * 17),
    "keep in words": asked(foveate={"keep": "most"}),
    "typo": asked(foveate={"keeps": 32}),
}


@pytest.mark.parametrize("name", ALSO_REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_engine_could_not_take_is_refused(served: Served, name: str, stream: bool) -> None:
    assert served.ask(ALSO_REFUSED[name] | {"stream": stream}).status == 400
    assert served.answers()


@pytest.mark.parametrize("name", REFUSED)
def test_requests_that_are_none_are_refused(served: Served, name: str) -> None:
    assert served.ask(REFUSED[name]).status in ((200,) if name in PASSES else (400, 404))


def test_options_of_processors_are_dropped(served: Served) -> None:
    reply = served.ask(asked(mm_processor_kwargs={"size": {"height": 4000, "width": 4000}}, media_io_kwargs={"image": {}}))

    assert reply.status == 200
    ours = served.ask(asked(mm_processor_kwargs={"foveate_keep": 1, "foveate_ticket": 1}))
    assert ours.headers["x-foveate-tokens"] == "before=144, after=36"


def test_files_are_refused_on_other_paths_too(served: Served) -> None:
    assert served.ask(asked(), "/tokenize").status == 200
    assert served.ask(asked("file:///etc/hostname"), "/tokenize").status == 400


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages", "/invocations", "/pooling"])
def test_other_paths_are_closed(served: Served, path: str) -> None:
    assert served.ask(asked(), path).status == 404


def test_sixty_four_clients_at_once(served: Served) -> None:
    keeps: list[Any] = [20, 36, "full", 0.5]

    def one(number: int) -> Any:
        return served.ask(asked(stream=number % 2 == 0, foveate={"keep": keeps[number % 4]}))

    with ThreadPoolExecutor(64) as pool:
        replies = list(pool.map(one, range(64)))

    assert {reply.status for reply in replies} == {200}
    assert [int(reply.headers["x-foveate-tokens"].rpartition("=")[2]) for reply in replies] == [20, 36, 144, 72] * 16


def test_a_file_of_questions_is_answered(served: Served, tmp_path: Path) -> None:
    ask_server(f"http://127.0.0.1:{served.port}", tmp_path)


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_hang_up_free_the_engine(served: Served, stream: bool) -> None:
    long = asked(max_tokens=800, min_tokens=800, ignore_eos=True, stream=stream)
    clients = [served.open(long) for _ in range(4)]
    assert not stream or all(client.recv(100).startswith(b"HTTP/1.1 200 ") for client in clients)
    until = time.monotonic() + 60
    while served.running() < 4 and time.monotonic() < until:  # vLLM counts now and then
        time.sleep(0.1)
    assert served.running() >= 4
    for client in clients:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()

    until = time.monotonic() + 60
    while served.running() and time.monotonic() < until:
        time.sleep(0.2)
    assert served.running() == 0


def test_a_body_that_is_too_large(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=120) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 100000000\r\n\r\n{{".encode())

        assert connection.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_never_ends(served: Served) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n{{".encode())
        assert served.answers()

        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


def test_all_is_counted_and_it_still_answers(served: Served) -> None:
    labels = f'{{recipe="{RECIPE}"}}'

    assert served.answers()
    assert served.metric("foveate_visual_tokens_before_total", labels) > served.metric(
        "foveate_visual_tokens_after_total", labels
    )
    assert served.metric("foveate_scoring_seconds_count", labels) > 0
    assert served.metric("foveate_shadow_answers_total", labels) > 0
    assert served.metric("foveate_shadow_equal_answers_total", labels) > 0
    assert served.metric("foveate_refused_requests_total", '{reason="scheme"}') > 0
    assert served.metric("foveate_method_failures_total", labels) == 0


@pytest.mark.slow
def test_two_replicas_share_the_requests_and_the_queue() -> None:
    server = Served(f"foveate serve reference --engine vllm --recipe '{RECIPE}' --replicas 2 --max-queue 8")
    try:
        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(lambda number: server.answers(), range(16)))
        with ThreadPoolExecutor(40) as pool:
            replies = list(pool.map(lambda number: server.ask(asked()), range(40)))
        # Four in each of the two processes that take requests.
        assert {reply.status for reply in replies} == {200, 429}
        assert all("4 requests are running or waiting" in reply.error["message"] for reply in replies if reply.status == 429)
        done = [
            server.metric(
                "vllm:request_success_total", f'{{engine="{engine}",finished_reason="stop",model_name="reference"}}'
            )
            for engine in range(2)
        ]
        labels = f'{{recipe="{RECIPE}"}}'
        assert min(done) > 0
        assert server.metric("foveate_visual_tokens_before_total", labels) == 144 * sum(done)
        assert server.metric("foveate_visual_tokens_after_total", labels) == 36 * sum(done)
    finally:
        server.close()
