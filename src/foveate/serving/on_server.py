"""Answers to rows: from a server that speaks the protocol of OpenAI, several requests at a time."""

from __future__ import annotations

import base64
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPMessage
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.text import first_line, one_line
from foveate.serving.answered import Answered, Answerer
from foveate.serving.asked import Asked
from foveate.serving.settings import Keep
from foveate.tasks.pictures import Lazy, Source, read_picture

TRIES = 6
"""How often a request is sent, where the server is away, busy or in trouble: for half a minute and the time it takes."""
START_SECONDS = 10
"""How long a server may take to say which models it has."""
_SECONDS = 600
_LONGEST_WAIT = 60.0
_PAUSE = 1.0
"""Seconds behind the first try; twice as long behind each further one, or what the server says."""
_BUSY = (408, 425, 429, 500, 502, 503, 504)
_SENT_AS_THEY_ARE = {"JPEG": "image/jpeg", "PNG": "image/png", "WEBP": "image/webp"}
_ORIENTATION = 0x0112
_TOKENS = re.compile(r"before=(\d+), *after=(\d+)")


class _GoneError(FoveateError):
    """Nobody answers at the address of the server."""


@dataclass(frozen=True)
class OnServer:
    """A running server, and what is asked of it with every row; `load` makes what answers.

    Attributes:
        url: its address, with or without ``/v1``.
        model: one of those that it serves.
        keep: what its recipe is to keep, where it is one of ``foveate serve`` and allows it.
        together: requests at a time.
        key: what it wants to know of who asks, if anything.
        tries: as `TRIES`.
        pause: as `_PAUSE`.
    """

    url: str
    model: str
    keep: Keep | None = None
    system: str | None = None
    together: int = 16
    key: str | None = field(default=None, repr=False)
    tries: int = TRIES
    pause: float = _PAUSE

    def load(self) -> Answerer:
        """What asks; the server is not asked yet."""
        return ServerAnswers(self)


def address(url: str) -> str:
    """The address of a server up to and with ``/v1``."""
    if not re.fullmatch(r"https?://[^/\s]+(/\S*)?", url):
        raise FoveateError(f"server={url!r}: must be an address such as http://localhost:8000")
    return f"{url.rstrip('/').removesuffix('/v1')}/v1"


def served(url: str, wanted: str | None, key: str | None = None) -> str:
    """The model to ask for: the wanted one, or the only one there is.

    Raises:
        FoveateError: if no server answers at the address, or if it does not serve that model, or several and none was named.
    """
    asked = Request(f"{address(url)}/models", headers=_headers(key))
    try:
        found = json.loads(_opened(asked, START_SECONDS)[0])
        names = [each["id"] for each in found["data"]]
    except HTTPError as error:
        raise FoveateError(f"server={url!r}: refuses to say which models it has ({error.code} {error.reason})") from error
    except (OSError, HTTPException) as error:
        raise FoveateError(f"server={url!r}: nobody answers ({_reason(error)}); start it, or name another one") from error
    except (ValueError, KeyError, TypeError) as error:
        raise FoveateError(f"server={url!r}: does not speak the protocol of OpenAI (no list at /v1/models)") from error
    if wanted in names:
        return str(wanted)
    if wanted is not None or len(names) != 1:
        raise FoveateError(f"model={wanted!r}: the server has {', '.join(map(repr, names)) or 'none'}; name one of them")
    return str(names[0])


class ServerAnswers:
    """Asks a server."""

    def __init__(self, server: OnServer, sleep: Callable[[float], None] = time.sleep) -> None:
        self._server = server
        self._sleep = sleep
        self._pool = ThreadPoolExecutor(server.together)

    def __call__(self, rows: Sequence[Asked]) -> list[Answered]:
        """As `foveate.serving.answered.Answerer`."""
        return list(self._pool.map(self._answer, rows))

    def _answer(self, row: Asked) -> Answered:
        began = time.perf_counter()
        try:
            answers, tokens = self._converse(row)
        except Exception as error:
            return Answered.failed(row, error, gone=isinstance(error, _GoneError))
        said = answers[0] if len(row.question.turns) == 1 else answers
        return Answered(row.id, said, *tokens, time.perf_counter() - began)

    def _converse(self, row: Asked) -> tuple[list[str], tuple[int | None, int | None]]:
        """The answers to all turns, and the tokens that the first turn's pictures had and kept."""
        assert isinstance(row.question.images, Lazy)
        pictures = [{"type": "image_url", "image_url": {"url": data_url(source)}} for source in row.question.images.sources]
        system = self._server.system
        messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system is not None else []
        answers: list[str] = []
        tokens: tuple[int | None, int | None] = (None, None)
        for number, turn in enumerate(row.question.turns):
            text = {"type": "text", "text": turn.prompt}
            messages.append({"role": "user", "content": [*pictures, text] if number == 0 else [text]})
            said, headers = self._ask(messages, row.question.max_new_tokens)
            if number == 0 and (found := _TOKENS.fullmatch(headers.get("x-foveate-tokens") or "")):
                tokens = int(found[1]), int(found[2])
            answers.append(said.strip())
            messages.append({"role": "assistant", "content": said})
        return answers, tokens

    def _ask(self, messages: Sequence[dict[str, Any]], longest: int) -> tuple[str, HTTPMessage]:
        body: dict[str, Any] = {"model": self._server.model, "messages": messages, "max_tokens": longest, "temperature": 0}
        if self._server.keep is not None:
            body["foveate"] = {"keep": self._server.keep}
        content, headers = self._sent(json.dumps(body).encode())
        try:
            return str(json.loads(content)["choices"][0]["message"]["content"] or ""), headers
        except (ValueError, KeyError, TypeError, IndexError) as error:
            raise FoveateError(f"server: answered without a message: {content[:200]!r}") from error

    def _sent(self, body: bytes) -> tuple[bytes, HTTPMessage]:
        """Send a request until it is answered, or was refused, or was tried often enough."""
        asked = Request(
            f"{address(self._server.url)}/chat/completions",
            body,
            {"Content-Type": "application/json", **_headers(self._server.key)},
        )
        for number in range(1, self._server.tries + 1):
            wait = self._server.pause * 2 ** (number - 1)
            try:
                return _opened(asked, _SECONDS)
            except HTTPError as error:
                said = error.read(2000).decode(errors="replace")
                failed = FoveateError(f"server: {error.code} {error.reason}: {' '.join(said.split())[:500]}")
                if error.code not in _BUSY:
                    raise failed from error
                wait = _told(error.headers.get("Retry-After"), wait)
            except TimeoutError as error:
                raise FoveateError(f"server: took longer than {_SECONDS} s") from error
            except (OSError, HTTPException) as error:
                failed = _GoneError(f"server: nobody answers, tried {number} times ({_reason(error)})")
            if number < self._server.tries:
                self._sleep(wait)
        raise failed


def data_url(source: Source) -> str:
    """A picture as part of a request: its file as it is, if every server shows it alike, else as PNG.

    Raises:
        FoveateError: if it cannot be read.
    """
    shown = read_picture(source)
    content = source if isinstance(source, bytes) else Path(source).read_bytes()
    with Image.open(BytesIO(content)) as picture:
        kind = _SENT_AS_THEY_ARE.get(picture.format or "")
        plain = (
            picture.mode in ("RGB", "L")
            and picture.getexif().get(_ORIENTATION, 1) == 1
            and "transparency" not in picture.info
        )
    if kind is None or not plain:
        written = BytesIO()
        shown.save(written, "PNG")
        kind, content = "image/png", written.getvalue()
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def key_of_environment() -> str | None:
    """What a server may want to know of who asks, where OpenAI's own clients take it from."""
    return os.environ.get("OPENAI_API_KEY")


def _headers(key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"} if key else {}


def _opened(asked: Request, seconds: float) -> tuple[bytes, HTTPMessage]:
    with urlopen(asked, timeout=seconds) as response:
        return response.read(), response.headers


def _reason(error: BaseException) -> str:
    return first_line(error.reason) if isinstance(error, URLError) and isinstance(error.reason, OSError) else one_line(error)


def _told(header: str | None, otherwise: float) -> float:
    """The seconds of a ``Retry-After``, within reason."""
    return min(float(header), _LONGEST_WAIT) if header and header.isascii() and header.isdigit() else otherwise
