"""What a request may say, and what becomes of it behind the door."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from tests.serving.door.conftest import RECIPE, SMALL, Behind, ask, chat, once

from foveate.core.errors import FoveateError
from foveate.serving import ticket
from foveate.serving.door import Door
from foveate.serving.door.rules import KEY, TRANSFORMERS, VARIABLE, VLLM, Rules
from foveate.serving.settings import Settings


def options(behind: Behind) -> Any:
    return behind.bodies[-1].get("mm_processor_kwargs")


def test_a_keep_goes_to_the_processor_with_a_ticket_and_no_option_of_the_client_s(door: Door, behind: Behind) -> None:
    sent = chat(SMALL, foveate={"keep": 0.25}, mm_processor_kwargs={"size": 4000}, media_io_kwargs={"image": {"a": 1}})

    reply = once(door, sent)

    assert (reply.status, reply.headers["x-own"]) == (200, "1")
    assert options(behind).keys() == {ticket.KEEP, ticket.TICKET}
    assert options(behind)[ticket.KEEP] == 0.25
    assert not {"foveate", "media_io_kwargs"} & behind.bodies[0].keys()
    assert behind.lengths == [len(json.dumps(behind.bodies[0]))]


def test_a_request_that_asks_for_nothing_gets_the_recipe_s_own_keep(door: Door, behind: Behind) -> None:
    once(door, chat(SMALL, mm_processor_kwargs={ticket.KEEP: 4}))

    assert options(behind).keys() == {ticket.TICKET}


def test_text_alone_is_handed_on_as_it_is(door: Door, behind: Behind) -> None:
    sent = chat()

    reply = once(door, sent)

    assert behind.bodies == [sent]
    assert "x-foveate-tokens" not in reply.headers


def test_tokens_before_and_after_are_in_a_header_and_the_ticket_is_given_back(door: Door, behind: Behind) -> None:
    reply = once(door, chat(SMALL))

    assert reply.headers["x-foveate-tokens"] == "before=576, after=64"
    with pytest.raises(KeyError):
        ticket.redeem(options(behind)[ticket.TICKET])


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"kep": 4}, "must be {"),
        ({"keep": 20, "seed": 1}, "must be {"),
        (64, "must be {"),
        (None, "must be {"),
        ({"keep": 0}, "keep=0"),
        ({"keep": True}, "keep=True"),
        ({"keep": "half"}, "keep='half'"),
        ({"keep": 1.5}, "keep=1.5"),
        ({"keep": [16]}, "keep=[16]"),
        ({"keep": 8}, "min_keep is 16"),
        ({"keep": 0.75}, "max_keep is 0.5"),
        ({"keep": "full"}, "max_keep is 0.5"),
    ],
)
def test_anything_else_under_our_name_is_refused(door: Door, behind: Behind, given: Any, said: str) -> None:
    reply = once(door, chat(SMALL, foveate=given))

    assert (reply.status, reply.error["param"]) == (400, "keep")
    assert said in reply.error["message"]
    assert behind.bodies == []


def test_counts_and_shares_are_compared_where_the_picture_is_known(door: Door, behind: Behind) -> None:
    assert once(door, chat(SMALL, foveate={"keep": 10_000})).status == 200
    assert once(door, chat(SMALL, foveate={"keep": 0.001})).status == 200


def test_without_a_recipe_only_full_can_be_asked_for(behind: Behind) -> None:
    door = Door(behind, Rules())

    assert once(door, chat(SMALL, foveate={"keep": "full"})).status == 200
    assert "no recipe" in once(door, chat(SMALL, foveate={"keep": 64})).error["message"]
    assert options(behind) is None


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"", "no JSON"),
        (b"[]", "JSON object"),
        (b'{"a": }', "no JSON"),
        (b'{"a": NaN}', "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "no JSON"),
        (b'{"a": "\xff"}', "no JSON"),
        (b'{"a": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "deeper"),
        (b'{"a": ' + b'{"a":' * 10_000 + b"1" + b"}" * 10_001, "deeper"),
        (b'{"a": ' + b"[" * 80 + b"]" * 80 + b"}", "deeper"),
        (b'{"a": [' + b"[]," * 500_000 + b"[]]}", "parts"),
    ],
)
def test_what_is_no_request_is_refused(door: Door, behind: Behind, raw: bytes, said: str) -> None:
    reply = once(door, raw)

    assert (reply.status, reply.error["param"]) == (400, "json")
    assert said in reply.error["message"]
    assert behind.bodies == []


def test_the_last_of_two_equal_names_is_the_one_that_is_checked(door: Door, behind: Behind) -> None:
    raw = b'{"messages": [], "media_io_kwargs": 1, "media_io_kwargs": {"size": 1}, "foveate": 1, "foveate": {"keep": 20}}'

    assert once(door, raw).status == 200
    assert behind.bodies == [{"messages": []}]


def test_a_body_is_bounded_whether_it_says_its_length_or_not(behind: Behind) -> None:
    door, piece = Door(behind, Rules(max_body=1000)), {"type": "http.request", "body": b"x" * 400, "more_body": True}

    said = once(door, b"{}", headers=[(b"content-length", b"1001")])
    unsaid = once(door, b"", sent=[piece] * 5)

    assert (said.status, unsaid.status) == (413, 413)
    assert said.headers["connection"] == "close"


def test_a_body_that_never_ends_is_given_up(behind: Behind) -> None:
    begun = {"type": "http.request", "body": b"{", "more_body": True}
    reply = once(Door(behind, Rules(body_seconds=0.05)), b"", sent=[begun])

    assert (reply.status, reply.error["param"]) == (408, "slow")


def test_who_hangs_up_while_sending_is_forgotten(door: Door, behind: Behind) -> None:
    gone = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    assert once(door, b"", sent=gone).status == 0
    assert behind.bodies == []
    assert once(door, chat()).status == 200


def test_packed_bodies_are_refused(door: Door) -> None:
    assert once(door, b"\x1f\x8b", headers=[(b"content-encoding", b"gzip")]).status == 415


@pytest.mark.parametrize("path", ["/v1/responses", "/invocations", "/v1/load_lora_adapter", "/v1/chat/completions/", "/"])
def test_other_paths_are_not_served(door: Door, behind: Behind, path: str) -> None:
    assert once(door, chat(), path=path).status == 404
    assert behind.bodies == []


def test_what_is_only_read_passes(door: Door, behind: Behind) -> None:
    assert once(door, b"", path="/v1/models", method="GET").status == 200
    assert once(door, b"", path="/v1/models", method="DELETE").status == 404


def test_sockets_of_the_web_are_closed_and_a_server_s_life_passes(door: Door) -> None:
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope["type"])

    async def send(message: Any) -> None:
        seen.append(message["type"])

    async def both() -> None:
        await Door(app, Rules())({"type": "lifespan"}, send, send)
        await Door(app, Rules())({"type": "websocket", "path": "/v1/realtime"}, send, send)

    asyncio.run(both())

    assert seen == ["lifespan", "websocket.close"]


def test_a_key_is_asked_for_before_anything_is_read(behind: Behind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    door = Door(behind, Rules())

    assert once(door, chat(), headers=[(b"authorization", b"Bearer secret")]).status == 200
    assert once(door, b"no JSON").status == 401
    assert once(door, chat(), headers=[(b"authorization", b"Bearer secre")]).status == 401
    assert once(door, b"", path="/v1/models", method="GET").status == 401
    assert once(door, b"", path="/health", method="GET").status == 200


def test_more_requests_than_the_queue_holds_are_told_when_to_come_back(behind: Behind) -> None:
    door = Door(behind, Rules(max_queue=2))

    async def crowd() -> list[Any]:
        opened = asyncio.Event()

        async def wait(receive: Any) -> None:
            await opened.wait()

        behind.doing = wait
        running = [asyncio.create_task(ask(door, chat())) for _ in range(5)]
        await asyncio.sleep(0.05)
        opened.set()
        return [*await asyncio.gather(*running), await ask(door, chat())]

    replies = asyncio.run(crowd())

    assert sorted(reply.status for reply in replies) == [200, 200, 200, 429, 429, 429]
    assert replies[-1].status == 200
    assert {reply.headers.get("retry-after") for reply in replies if reply.status == 429} == {"1"}


def test_a_server_that_fails_frees_its_place(behind: Behind) -> None:
    door = Door(behind, Rules(max_queue=1))

    async def fail(receive: Any) -> None:
        raise ArithmeticError

    behind.doing = fail
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            once(door, chat())
    behind.doing = None

    assert once(door, chat()).status == 200


def test_the_server_hears_who_hangs_up(door: Door, behind: Behind) -> None:
    heard: list[str] = []

    async def listen(receive: Any) -> None:
        heard.append((await receive())["type"])

    behind.doing = listen
    once(door, b"", sent=[{"type": "http.request", "body": b"{}"}, {"type": "http.disconnect"}])

    assert heard == ["http.disconnect"]


def test_the_fallback_takes_no_options_of_templates_or_generation(behind: Behind) -> None:
    door = Door(behind, Rules(Settings(RECIPE), behind=TRANSFORMERS))

    for name in ("chat_template_kwargs", "generation_config"):
        assert once(door, chat(SMALL, **{name: {}})).error["message"].startswith(name)
    assert once(door, chat(SMALL)).status == 200
    assert options(behind) is None


def test_rules_reach_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = Rules(Settings(RECIPE, 16, 0.5), max_images=3, media_domains=("example.org",), behind=TRANSFORMERS)
    monkeypatch.setenv(VARIABLE, rules.to_json())

    assert Rules.from_environment() == rules
    monkeypatch.delenv(VARIABLE)
    assert Rules.from_environment() == Rules(behind=VLLM)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"max_images": 0}, "max_images=0"),
        ({"shadow": 2.0}, "shadow=2.0"),
        ({"shadow": 0.1}, "no recipe"),
        ({"shadow": 0.1, "settings": Settings(RECIPE, max_keep=0.5)}, "max_keep=0.5"),
        ({"shadow": 0.1, "settings": Settings(RECIPE, max_keep=64)}, "max_keep=64"),
        ({"shadow": 0.1, "settings": Settings(RECIPE, max_keep=1)}, "max_keep=1"),
        ({"other_media": True, "behind": TRANSFORMERS}, "text and pictures"),
    ],
)
def test_rules_that_make_no_sense_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(FoveateError, match=said):
        Rules(**given)
