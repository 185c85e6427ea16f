"""What a door lets in: set by the operator, handed to the server's process in an environment variable."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from foveate.core.errors import FoveateError
from foveate.serving.settings import Settings

VARIABLE: Final = "FOVEATE_DOOR"
"""Holds the rules as JSON: vLLM is given the name of a class to put in front of it, and no arguments for it."""
KEY: Final = "FOVEATE_API_KEY"
"""If set, what requests must bring as bearer token. Not among the rules, which may be logged."""


@dataclass(frozen=True)
class Behind:
    """What the server behind the door is like.

    Attributes:
        name: as it is said.
        paths: where requests with a body go; others are refused.
        refuses: fields of a request that would be handed on as keywords of functions nobody guards.
        takes_media: whether videos and sound may be let through.
        takes_uuid: whether a picture may be named by a client's own id instead of sent.
        by_body: whether keep and ticket are written into the body, for a processor to read.
        counts: whether it counts tokens itself.
    """

    name: str
    paths: frozenset[str]
    refuses: frozenset[str] = frozenset()
    takes_media: bool = False
    takes_uuid: bool = False
    by_body: bool = False
    counts: bool = False


CHAT = "/v1/chat/completions"
VLLM = Behind(
    "vllm",
    frozenset({CHAT, "/v1/completions", "/tokenize", "/detokenize"}),
    takes_media=True,
    takes_uuid=True,
    by_body=True,
    counts=True,
)
TRANSFORMERS = Behind("transformers", frozenset({CHAT}), refuses=frozenset({"generation_config", "chat_template_kwargs"}))


@dataclass(frozen=True)
class Rules:
    """What an operator allows.

    Attributes:
        settings: recipe and bounds; None: the model runs as it is.
        max_images: pictures (and other media) of a request.
        max_pixels: of each picture.
        max_body: bytes of a request.
        max_queue: requests that are inside at a time, running or waiting.
        body_seconds: how long a request may take to come in.
        fetch_seconds: how long a picture may take to be fetched.
        media_domains: hosts (``example.org``, ``example.org:8443``) that pictures are fetched from; without any, pictures
            come as ``data:`` URLs only.
        other_media: whether videos and sound pass, which nobody looks into.
        shadow: share of requests that are answered a second time, with all tokens.
    """

    settings: Settings | None = None
    max_images: int = 16
    max_pixels: int = 16_000_000
    max_body: int = 32 * 2**20
    max_queue: int = 256
    body_seconds: float = 30.0
    fetch_seconds: float = 10.0
    media_domains: tuple[str, ...] = ()
    other_media: bool = False
    shadow: float = 0.0
    behind: Behind = field(default=VLLM, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_images", "max_pixels", "max_body", "max_queue"):
            if getattr(self, name) < 1:
                raise FoveateError(f"{name}={getattr(self, name)!r}: must be at least 1")
        if not 0 <= self.shadow <= 1:
            raise FoveateError(f"shadow={self.shadow!r}: must be a share of the requests, 0 to 1")
        if self.shadow and self.settings is None:
            raise FoveateError(f"shadow={self.shadow!r}: there is no recipe to compare with; give one")
        most = None if self.settings is None else self.settings.max_keep
        if self.shadow and most is not None and (isinstance(most, int) or most < 1):  # 1 is a count, too
            raise FoveateError(
                f"shadow={self.shadow!r}: runs requests with all tokens, which max_keep={most!r} "
                "forbids; leave one of them out"
            )
        if self.other_media and not self.behind.takes_media:
            raise FoveateError("allow_other_media: the server on transformers takes text and pictures; leave it out")

    def to_json(self) -> str:
        """For `VARIABLE`."""
        values: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return json.dumps(values | {"settings": self.settings and asdict(self.settings), "behind": self.behind.name})

    @classmethod
    def from_environment(cls) -> Rules:
        """What `VARIABLE` says; the defaults, which are closed, where it says nothing."""
        values = json.loads(os.environ.get(VARIABLE, "{}"))
        if settings := values.pop("settings", None):
            values["settings"] = Settings.of(settings)
        values["media_domains"] = tuple(values.pop("media_domains", ()))
        values["behind"] = TRANSFORMERS if values.pop("behind", "") == TRANSFORMERS.name else VLLM
        return cls(**values)
