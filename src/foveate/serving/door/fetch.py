"""Pictures from hosts that the operator allows, and from nowhere else.

A name is looked up once, its address is checked, and that very address is connected to, so a name that answers otherwise the
next time changes nothing; certificates are checked against the name. Redirects are refused. Bytes and time are bounded.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import SplitResult, urlsplit

import h11

from foveate.serving.door.asgi import RefusalError

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[list[str]]]
Connect = Callable[..., Awaitable[tuple[asyncio.StreamReader, asyncio.StreamWriter]]]
_PORTS = {"http": 80, "https": 443}
_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"))
"""Addresses that gateways turn into the IPv4 address in their last bits."""
_PIECE = 2**16


def is_public(address: Address) -> bool:
    """Whether an address is one of the public internet, also behind the ways of writing an IPv4 address as IPv6."""
    if isinstance(address, IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and any(address in network for network in _TRANSLATED):
            inner = IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(inner)
        if address.is_site_local or address.scope_id:
            return False
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


async def look_up(host: str, port: int) -> list[str]:
    """The addresses of a name, the preferred first."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


@dataclass(frozen=True)
class Fetcher:
    """Fetches pictures.

    Attributes:
        domains: hosts that are allowed, with a port where it is not the scheme's own.
        most: bytes of a picture.
        seconds: from the look-up to the last byte.
        resolve, connect, public: the network, which tests replace.
    """

    domains: tuple[str, ...]
    most: int
    seconds: float
    resolve: Resolve = look_up
    connect: Connect = asyncio.open_connection
    public: Callable[[Address], bool] = is_public

    @cached_property
    def allowed(self) -> frozenset[str]:
        """The hosts, as they are compared."""
        return frozenset(domain.lower().rstrip(".") for domain in self.domains)

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Checks certificates."""
        return ssl.create_default_context()

    async def fetch(self, url: str, place: str, most: int | None = None) -> bytes:
        """The content of ``url``, if it has at most ``most`` bytes (None: as many as any picture may have).

        Raises:
            RefusalError: if the host is not allowed or not public, or gives anything but a picture within the bounds.
        """
        parts, host, port = self._target(url, place)
        try:
            async with asyncio.timeout(self.seconds):
                address = await self._address(host, port, place)
                return await self._get(parts, host, port, address, place, self.most if most is None else most)
        except TimeoutError:
            raise _failed(place, host, f"took more than {self.seconds:g} seconds") from None
        except h11.ProtocolError:
            raise _failed(place, host, "gives no whole answer") from None
        except OSError as error:
            # What a certificate or a socket says is no secret of this network: only allowed, public hosts get here.
            raise _failed(place, host, " ".join(str(error).split())[:120]) from None

    def _target(self, url: str, place: str) -> tuple[SplitResult, str, int]:
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").rstrip(".").encode("idna").decode()
            port = parts.port or _PORTS[parts.scheme]
        except (ValueError, KeyError):
            raise RefusalError(400, "url", f"{place}: is no URL that pictures are fetched from") from None
        name = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
        if parts.username is not None or name not in self.allowed:
            raise RefusalError(400, "domain", f"{place}: the host {name[:100]!r} is not allowed here; send a data: URL")
        return parts, host, port

    async def _address(self, host: str, port: int, place: str) -> str:
        addresses = await self.resolve(host, port)
        # One that is not public spoils all: an honest public name has none.
        if not addresses or not all(self.public(ip_address(address)) for address in addresses):
            raise RefusalError(400, "address", f"{place}: the host {host!r} has an address that is not public")
        return addresses[0]

    async def _get(self, parts: SplitResult, host: str, port: int, address: str, place: str, most: int) -> bytes:
        secure = {"ssl": self.tls, "server_hostname": host} if parts.scheme == "https" else {}
        reader, writer = await self.connect(address, port, **secure)
        try:
            peer = h11.Connection(h11.CLIENT)
            target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
            named = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
            headers = [("Host", named), ("Accept", "image/*"), ("Accept-Encoding", "identity"), ("Connection", "close")]
            try:
                request = h11.Request(method="GET", target=target.encode("ascii"), headers=headers)
            except (h11.LocalProtocolError, UnicodeEncodeError):
                raise RefusalError(400, "url", f"{place}: is no URL; quote what is no ASCII") from None
            writer.write(peer.send(request) or b"")
            writer.write(peer.send(h11.EndOfMessage()) or b"")
            await writer.drain()
            return await self._answer(peer, reader, host, place, most)
        finally:
            writer.close()

    async def _answer(self, peer: h11.Connection, reader: asyncio.StreamReader, host: str, place: str, most: int) -> bytes:
        content = bytearray()
        while True:
            event = peer.next_event()
            if event is h11.NEED_DATA:
                peer.receive_data(await reader.read(_PIECE))
            elif isinstance(event, h11.Response):
                if 300 <= event.status_code < 400:
                    raise _failed(place, host, "redirects, and redirects are not followed", "redirect")
                if event.status_code != 200:
                    raise _failed(place, host, f"answered {event.status_code}")
            elif isinstance(event, h11.Data):
                content += event.data
                if len(content) > most:
                    raise _failed(place, host, f"gives more than {most} bytes")
            elif isinstance(event, h11.EndOfMessage):
                return bytes(content)


def _failed(place: str, host: str, why: str, reason: str = "fetch") -> RefusalError:
    return RefusalError(400, reason, f"{place}: the host {host!r} {why}")
