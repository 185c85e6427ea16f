"""What an answer brings along, and what a second one, with all tokens, is compared with."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from prometheus_client import REGISTRY
from tests.serving.door.conftest import RECIPE, SMALL, Behind, ask, chat, once

from foveate.serving import ticket
from foveate.serving.door import Door
from foveate.serving.door.answer import said
from foveate.serving.door.rules import Rules
from foveate.serving.settings import Settings


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


class Counted:
    """How much the counters grew meanwhile."""

    NAMES = ("visual_tokens_before", "visual_tokens_after", "shadow_answers", "shadow_equal_answers")

    def __init__(self, recipe: str) -> None:
        self.recipe, self.before = recipe, self._now(recipe)

    def _now(self, recipe: str) -> list[float]:
        return [value(f"foveate_{name}_total", recipe=recipe) for name in self.NAMES]

    def __call__(self) -> tuple[float, ...]:
        return tuple(now - before for now, before in zip(self._now(self.recipe), self.before))


@pytest.fixture
def counted() -> Counted:
    return Counted(RECIPE)


def test_tokens_and_refusals_are_counted(door: Door, behind: Behind, counted: Counted) -> None:
    refused = value("foveate_refused_requests_total", reason="keep")

    once(door, chat(SMALL))
    once(door, chat(SMALL, SMALL, stream=True))
    once(door, chat())
    once(door, chat(SMALL, foveate=1))

    assert counted()[:2] == (0, 0)  # vLLM's processor counts these
    assert value("foveate_refused_requests_total", reason="keep") - refused == 1
    assert value("foveate_requests_inside") == 0


def test_a_stream_goes_through_piece_by_piece(door: Door, behind: Behind) -> None:
    reply = once(door, chat(SMALL, stream=True))

    assert reply.headers["x-foveate-tokens"] == "before=576, after=64"
    assert reply.body.count(b"data: ") == 3
    assert said(reply.body) == "red"


def streamed(door: Door, noted_behind: int, pieces: int, pause: asyncio.Event | None = None) -> list[tuple[int, Any]]:
    """What a client has after each piece of a server that notes the tokens behind one of its pieces."""
    arrived: list[Any] = []
    course: list[tuple[int, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        options = json.loads((await receive())["body"])["mm_processor_kwargs"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for number in range(pieces):
            if number == noted_behind:
                ticket.note(options[ticket.TICKET], 576, 64)
            await send({"type": "http.response.body", "body": b"x", "more_body": number < pieces - 1})
            course.append((len(arrived), arrived[0]["headers"] if arrived else None))

    async def receive() -> Any:
        return {"type": "http.request", "body": json.dumps(chat(SMALL)).encode()}

    async def send(message: Any) -> None:
        arrived.append(message)

    door.app = app
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    asyncio.run(asyncio.wait_for(door(scope, receive, send), 5))
    return course


HEADER = [(b"x-foveate-tokens", b"before=576, after=64")]


def test_a_stream_waits_until_its_tokens_are_known_and_no_longer(door: Door) -> None:
    assert streamed(door, noted_behind=0, pieces=4) == [(2, HEADER), (3, HEADER), (4, HEADER), (5, HEADER)]
    assert streamed(door, noted_behind=1, pieces=3) == [(0, None), (3, HEADER), (4, HEADER)]
    assert streamed(door, noted_behind=3, pieces=4) == [(0, None), (3, []), (4, []), (5, [])]
    assert streamed(door, noted_behind=9, pieces=1) == [(2, [])]


def test_a_server_without_a_recipe_notes_nothing(behind: Behind) -> None:
    assert "x-foveate-tokens" not in once(Door(behind, Rules()), chat(SMALL)).headers


async def shadowed(door: Door, *bodies: Any) -> None:
    for body in bodies:
        await ask(door, body)
        await asyncio.sleep(0.05)


def test_a_share_of_the_answers_is_made_again_with_all_tokens(behind: Behind, counted: Counted) -> None:
    door = Door(behind, Rules(Settings(RECIPE), shadow=1.0))
    behind.answers = ("red", "red", "red", "blue", "red", "red")

    asyncio.run(
        shadowed(
            door,
            chat(SMALL, temperature=0),
            chat(SMALL, temperature=0, foveate={"keep": 20}),
            chat(SMALL, temperature=0, stream=True, stream_options={"include_usage": True}),
        )
    )

    first, second, *_ = behind.bodies
    assert second["mm_processor_kwargs"][ticket.KEEP] == "full"
    assert second["mm_processor_kwargs"][ticket.TICKET] != first["mm_processor_kwargs"][ticket.TICKET]
    assert [body.get("stream", False) for body in behind.bodies] == [False, False, False, False, True, False]
    assert "stream_options" not in behind.bodies[-1]
    assert all(body["messages"] == first["messages"] for body in behind.bodies)
    assert counted()[2:] == (3, 2)


def test_what_cannot_be_compared_is_asked_once(behind: Behind, counted: Counted) -> None:
    door = Door(behind, Rules(Settings(RECIPE), shadow=1.0))
    sampled, several = chat(SMALL), chat(SMALL, temperature=0, n=2)
    full, text = chat(SMALL, temperature=0, foveate={"keep": "full"}), chat(temperature=0)

    asyncio.run(shadowed(door, sampled, several, full, text))

    assert len(behind.bodies) == 4
    assert counted()[2:] == (0, 0)


def test_shadows_that_fail_or_are_many_harm_nobody(behind: Behind, counted: Counted) -> None:
    door = Door(behind, Rules(Settings(RECIPE), shadow=1.0))
    opened = asyncio.Event()

    async def wait(receive: Any) -> None:
        if behind.bodies[-1]["mm_processor_kwargs"].get(ticket.KEEP) == "full":
            await opened.wait()
            raise ArithmeticError

    async def run() -> list[int]:
        behind.doing = wait
        replies = [await ask(door, chat(SMALL, temperature=0)) for _ in range(6)]
        await asyncio.sleep(0.05)
        opened.set()
        await asyncio.sleep(0.05)
        return [reply.status for reply in replies]

    assert asyncio.run(run()) == [200] * 6
    assert len(behind.bodies) == 6 + 2
    assert counted()[2:] == (0, 0)


@pytest.mark.parametrize("body", [b"", b"{}", b"data: [DONE]", b'{"choices": []}', b"data: {", b'{"choices": [{}]}'])
def test_what_is_no_answer_says_nothing(body: bytes) -> None:
    assert not said(body)
