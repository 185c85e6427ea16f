"""Pictures from other hosts: from those that are allowed, at the address that was looked at, and not for ever."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Any

import pytest
from PIL import Image
from tests.serving.door.conftest import Behind, ask, chat, encoded, url

from foveate.serving.door import Door
from foveate.serving.door.asgi import RefusalError
from foveate.serving.door.fetch import Fetcher, is_public
from foveate.serving.door.rules import Rules

PICTURE = encoded(Image.new("RGB", (8, 8), "red"))
WHOLE = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(PICTURE) + PICTURE
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@pytest.mark.parametrize("address", ["93.184.216.34", "2606:2800:220:1::1", "::ffff:93.184.216.34", "64:ff9b::5db8:d822"])
def test_addresses_of_the_internet_are_public(address: str) -> None:
    assert is_public(ip_address(address))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "127.8.0.1", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1",
        "192.0.2.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255", "::", "::1", "fe80::1", "fe80::1%1",
        "fc00::1", "fec0::1", "ff02::1", "2001:db8::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe", "64:ff9b:1::a00:1", "2002:7f00:1::", "2002:a00:1::", "2001:0:4136:e378:8000:63bf:80ff:fffe",
    ],
)  # fmt: skip
def test_addresses_of_a_network_of_one_s_own_are_not(address: str) -> None:
    assert not is_public(ip_address(address))


def answering(answer: bytes, seen: list[bytes] | None = None, pause: float = 0.0) -> Serve:
    """A host that says this to whoever comes."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.readuntil(b"\r\n\r\n")
        if seen is not None:
            seen.append(request)
        for piece in (answer,) if not pause else [answer[i : i + 1] for i in range(len(answer))]:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause)
        writer.close()

    return serve


def fetched(serve: Serve, path: str = "/a.png", **more: Any) -> bytes:
    """What a host on this machine gives, taken for a public one."""

    async def run() -> bytes:
        host = await asyncio.start_server(serve, "127.0.0.1", 0)
        port = host.sockets[0].getsockname()[1]

        async def look_up(name: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        given: dict[str, Any] = {"most": 10_000, "seconds": 5.0, "resolve": look_up, "public": lambda address: True} | more
        async with host:
            return await Fetcher((f"example.org:{port}",), **given).fetch(f"http://example.org:{port}{path}", "it")

    return asyncio.run(run())


def refused(serve: Serve, **more: Any) -> RefusalError:
    with pytest.raises(RefusalError) as error:
        fetched(serve, **more)
    return error.value


def test_a_picture_is_fetched_by_the_host_s_name() -> None:
    seen: list[bytes] = []

    assert fetched(answering(WHOLE, seen), "/a%20b.png?size=1") == PICTURE
    assert seen[0].startswith(b"GET /a%20b.png?size=1 HTTP/1.1\r\nHost: example.org:")


def test_pieces_are_put_together() -> None:
    chunks = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"

    assert fetched(answering(chunks)) == b"abcde"
    assert fetched(answering(b"HTTP/1.0 200 OK\r\n\r\nabc")) == b"abc"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_refused(status: int) -> None:
    answer = b"HTTP/1.1 %d Elsewhere\r\nlocation: http://169.254.169.254/\r\ncontent-length: 0\r\n\r\n" % status

    assert refused(answering(answer)).reason == "redirect"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", "answered 404"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 20000\r\n\r\n" + bytes(20_000), "more than 10000 bytes"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + bytes(20_000), "more than 10000 bytes"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\nabc", "no whole answer"),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000, "no whole answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "no whole answer"),
        (b"", "no whole answer"),
    ],
)
def test_hosts_that_give_no_picture_are_named(answer: bytes, said: str) -> None:
    error = refused(answering(answer))

    assert (error.status, error.reason) == (400, "fetch")
    assert said in error.message


def test_a_host_that_answers_byte_by_byte_is_given_up() -> None:
    assert "took more than 0.2 seconds" in refused(answering(WHOLE, pause=0.05), seconds=0.2).message


class Network:
    """Names and their addresses, one answer after the other, and the connections that were asked for."""

    def __init__(self, *answers: list[str]) -> None:
        self.answers, self.asked = list(answers), 0
        self.connected: list[tuple[Any, ...]] = []

    async def look_up(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.answers.pop(0)

    async def connect(self, address: str, port: int, **tls: Any) -> Any:
        self.connected.append((address, port, tls.get("server_hostname")))
        raise OSError("no network here")

    def fetch(self, *domains: str, url: str) -> RefusalError:
        fetcher = Fetcher(domains, 1000, 1.0, self.look_up, self.connect)
        with pytest.raises(RefusalError) as error:
            asyncio.run(fetcher.fetch(url, "it"))
        return error.value


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["10.1.2.3"], ["93.184.216.34", "127.0.0.1"], ["::ffff:10.0.0.1"], []])
def test_names_that_lead_to_private_addresses_are_refused(addresses: list[str]) -> None:
    network = Network(addresses)

    assert network.fetch("example.org", url="http://example.org/a.png").reason == "address"
    assert network.connected == []


def test_a_name_is_looked_up_once_and_its_address_is_what_is_connected_to() -> None:
    network = Network(["93.184.216.34"], ["127.0.0.1"])

    assert "no network here" in network.fetch("example.org", url="https://example.org/a.png").message
    assert network.asked == 1
    assert network.connected == [("93.184.216.34", 443, "example.org")]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ("http://example.com/", "domain"),
        ("http://sub.example.org/", "domain"),
        ("http://example.org.evil.net/", "domain"),
        ("http://example.org@evil.net/", "domain"),
        ("http://user@example.org/", "domain"),
        ("http://example.org:8080/", "domain"),
        ("http://example.org:99999/", "url"),
        ("http://" + "a" * 300 + ".org/", "url"),
        ("http:///a.png", "domain"),
        ("http://2130706433/", "domain"),
        ("http://example.org/\r\nx: y", "address"),
    ],
)
def test_only_hosts_that_are_listed_are_asked(given: str, reason: str) -> None:
    network = Network(["127.0.0.1"])

    assert network.fetch("Example.ORG.", url=given).reason == reason
    assert network.connected == []


@pytest.mark.parametrize("given", ["http://EXAMPLE.org/", "http://example.org./a", "http://example.org:80/a"])
def test_a_host_is_the_same_however_it_is_written(given: str) -> None:
    network = Network(["93.184.216.34"])

    network.fetch("example.org", url=given)

    assert [address for address, *_ in network.connected] == ["93.184.216.34"]


def test_what_is_no_header_line_is_never_sent() -> None:
    for path in ("/a b", "/\x00", "/ä"):
        assert refused(answering(WHOLE), path=path).reason == "url"


def test_the_door_hands_on_what_it_fetched(behind: Behind) -> None:
    padded = PICTURE + bytes(1000)
    whole = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(padded) + padded

    async def run() -> Any:
        host = await asyncio.start_server(answering(whole), "127.0.0.1", 0)
        port = host.sockets[0].getsockname()[1]
        door = Door(behind, Rules(media_domains=(f"localhost:{port}",), max_body=2 * len(padded) + 1))
        given = door.fetcher
        async with host:
            private = await ask(door, chat(f"http://localhost:{port}/a.png"))
            door.fetcher = Fetcher(given.domains, given.most, given.seconds, public=lambda address: True)
            public = await ask(door, chat(f"http://localhost:{port}/a.png"))
            return private, public, await ask(door, chat(*[f"http://localhost:{port}/{number}.png" for number in range(3)]))

    private, public, several = asyncio.run(run())

    assert (private.status, private.error["param"]) == (400, "address")
    assert public.status == 200
    assert behind.bodies[0]["messages"][0]["content"][0]["image_url"]["url"] == url(padded)
    assert "messages[0].content[2]" in several.error["message"]
    assert "more than 1 bytes" in several.error["message"]
