"""The pictures of a request: found, checked, and put back as ``data:`` URLs.

Whoever reads the request later, vLLM or transformers, sees no other URL and so opens no file and no connection of its own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from foveate.serving.door import pictures
from foveate.serving.door.asgi import RefusalError
from foveate.serving.door.fetch import Fetcher
from foveate.serving.door.rules import Rules

_TEXT = frozenset({"text", "input_text", "output_text", "refusal", "thinking", "tool_reference"})
_PICTURE = frozenset({"image_url", "input_image"})
_OTHER = frozenset({"video_url", "audio_url", "input_audio"})
_KEYS = {*_OTHER, "image_url", "input_image", "image", "image_pil", "video", "audio", "file", "source"}
_KEYS |= {"image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"}
"""Keys of a part under which a server may look for media, whatever the part's type says (vLLM does so beside a ``uuid``)."""

_decoders = ThreadPoolExecutor(4, "foveate-pictures")
"""Few at a time, as each may hold all pixels of a picture."""


@dataclass(frozen=True)
class Part:
    """A picture, video or sound of a request.

    Attributes:
        holder, key: where its URL stands.
        place: how a client finds it.
        picture: whether it is one.
    """

    holder: dict[str, Any]
    key: str
    place: str
    picture: bool


def parts(body: dict[str, Any], rules: Rules) -> Iterator[Part]:
    """All media of a request, in order.

    Raises:
        RefusalError: if there is anything in a message that could be media of another kind, or text or a picture written
            otherwise than OpenAI's API says.
    """
    messages = body.get("messages", [])
    if not isinstance(messages, list):
        raise RefusalError(400, "messages", "messages: must be a list")
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, dict) else 0
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise RefusalError(400, "messages", f"messages[{number}]: its content must be text or a list of parts")
        for index, part in enumerate(content):
            found = _media(part, f"messages[{number}].content[{index}]", rules)
            if found is not None:
                yield found


def _media(part: Any, place: str, rules: Rules) -> Part | None:
    if isinstance(part, str):
        return None
    if not isinstance(part, dict) or not isinstance(part.get("type", ""), str):
        raise RefusalError(400, "part", f"{place}: must be an object with a type")
    kind, keys = part.get("type"), part.keys() & _KEYS
    if not keys and (kind in _TEXT or (kind is None and "text" in part)):
        return None
    if keys == {"image_url"} and (kind is None or kind in _PICTURE):
        if part["image_url"] is None and rules.behind.takes_uuid and isinstance(part.get("uuid"), str):
            return Part(part, "", place, True)
        return _url(part, "image_url", place, picture=True)
    if len(keys) == 1 and keys <= _OTHER and kind in (None, *keys):
        if not rules.other_media:
            raise RefusalError(400, "media", f"{place}: {next(iter(keys))}: this server takes text and pictures")
        key = next(iter(keys))
        if key == "input_audio":  # bytes in place
            return Part(part, "", place, False)
        return _url(part, key, place, picture=False)
    raise RefusalError(400, "part", f"{place}: {kind!r:.60}: must be text, or image_url and nothing else")


def _url(part: dict[str, Any], key: str, place: str, *, picture: bool) -> Part:
    holder = part[key] if isinstance(part[key], dict) else part
    inner = "url" if holder is not part else key
    if not isinstance(holder.get(inner), str):
        raise RefusalError(400, "part", f"{place}: {key} must hold a URL")
    return Part(holder, inner, f"{place}.{key}", picture)


async def settle(body: dict[str, Any], rules: Rules, fetcher: Fetcher) -> int:
    """Checks all media of a request and puts ``data:`` URLs in their places; how many pictures there are.

    Raises:
        RefusalError: if there are too many, or one is refused.
    """
    found = list(parts(body, rules))
    if len(found) > rules.max_images:
        raise RefusalError(400, "images", f"messages: {len(found)} pictures; at most {rules.max_images} in a request")
    left = rules.max_body  # what is fetched for a request takes as much memory as what comes with it
    for part in found:
        if part.key:
            url, fetched = await _settled(part, rules, fetcher, left)
            part.holder[part.key] = url
            left -= fetched
    return sum(part.picture for part in found)


async def _settled(part: Part, rules: Rules, fetcher: Fetcher, left: int) -> tuple[str, int]:
    """The URL to put in its place, and how many bytes were fetched for it."""
    url: str = part.holder[part.key]
    scheme, fetched = url[:5].lower(), 0
    if scheme == "data:":
        if not part.picture:
            return url, 0
        content = pictures.from_data_url(url, part.place)
    elif scheme in ("http:", "https"):
        if not part.picture:
            raise RefusalError(400, "media", f"{part.place}: videos and sound come as data: URLs only")
        content = await fetcher.fetch(url, part.place, left)
        fetched = len(content)
    else:
        # Also what has no scheme at all: transformers would open it as a file.
        raise RefusalError(400, "scheme", f"{part.place}: must be a data: URL{' or http(s)' if rules.media_domains else ''}")
    loop = asyncio.get_running_loop()
    whole = await loop.run_in_executor(_decoders, pictures.checked_url, content, part.place, rules.max_pixels)
    return whole, fetched
