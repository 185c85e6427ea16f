"""The door itself: lets a request in, or turns it away."""

from __future__ import annotations

import hmac
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from foveate.serving import ticket
from foveate.serving.door import asked, media
from foveate.serving.door.answer import Answer
from foveate.serving.door.asgi import App, Receive, RefusalError, Scope, Send
from foveate.serving.door.body import HangUpError, parse, read
from foveate.serving.door.fetch import Fetcher
from foveate.serving.door.metrics import NO_RECIPE, metrics, tokens
from foveate.serving.door.rules import KEY, Rules
from foveate.serving.door.shadow import Shadow, with_length
from foveate.serving.door.visit import VISIT, Inbox, Visit

_SAFE = frozenset({"GET", "HEAD", "OPTIONS"})
_OPEN = frozenset({"/health", "/metrics", "/ping"})
"""Paths that need no key, as in vLLM."""
_RETRY_SECONDS = 1


class Door:
    """ASGI middleware in front of a server.

    Args:
        app: the server.
        rules: what is let in; if None, what the environment says (`Rules.from_environment`).
    """

    def __init__(self, app: App, rules: Rules | None = None) -> None:
        self.app, self.rules = app, Rules.from_environment() if rules is None else rules
        self.fetcher = Fetcher(self.rules.media_domains, self.rules.max_body, self.rules.fetch_seconds)
        self._inside = 0
        self._key = os.environ.get(KEY, "").encode()

    @cached_property
    def recipe(self) -> str:
        """Under which name tokens are counted."""
        return NO_RECIPE if self.rules.settings is None else self.rules.settings.recipe

    @cached_property
    def shadow(self) -> Shadow | None:
        """Runs some requests again."""
        return Shadow(self.app, self.rules.shadow, self.recipe, self._written) if self.rules.shadow else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close", "code": 1008, "reason": "not served behind this door"})
        try:
            path = scope["path"].removeprefix(scope.get("root_path", ""))
            self._check_key(scope, path)
            if scope["method"] in _SAFE:
                return await self.app(scope, receive, send)
            if scope["method"] != "POST" or path not in self.rules.behind.paths:
                raise RefusalError(404, "path", f"{scope['method']} {path[:100]}: is not served behind this door")
            with self._slot():
                await self._serve(scope, receive, send)
        except RefusalError as refused:
            metrics().refused.labels(refused.reason).inc()
            await refused.answer(send)
        except HangUpError:
            metrics().refused.labels("left").inc()

    def _check_key(self, scope: Scope, path: str) -> None:
        if not self._key or scope["method"] == "OPTIONS" or path in _OPEN:
            return
        given = next((value for name, value in scope["headers"] if name == b"authorization"), b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() != b"bearer" or not hmac.compare_digest(token, self._key):
            raise RefusalError(401, "key", "authorization: must be the bearer token of this server")

    @contextmanager
    def _slot(self) -> Iterator[None]:
        """A place inside, taken before the body is read: bodies need memory."""
        if self._inside >= self.rules.max_queue:
            retry = ((b"retry-after", str(_RETRY_SECONDS).encode()),)
            raise RefusalError(429, "queue", f"{self._inside} requests are running or waiting; try again later", retry)
        self._inside += 1
        metrics().inside.inc()
        try:
            yield
        finally:
            self._inside -= 1
            metrics().inside.dec()

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        rules = self.rules
        body = parse(await read(scope, receive, rules.max_body, rules.body_seconds))
        keep = asked.take(body, rules.settings)
        if unwanted := sorted(rules.behind.refuses & body.keys()):
            raise RefusalError(400, "field", f"{unwanted[0]}: is not taken by this server; leave it out")
        pictures = await media.settle(body, rules, self.fetcher)
        counted = bool(pictures) and rules.settings is not None
        visit = Visit(keep, ticket.draw() if counted else None)
        twice = self.shadow if self.shadow is not None and counted and self.shadow.wants(body, keep) else None
        answer = Answer(send, visit.ticket, copied=twice is not None)
        raw = self._written(body, visit)
        inbox, scope = Inbox(raw, receive, lambda: setattr(visit, "gone", True)), with_length(scope, len(raw))
        del raw  # pictures are large, and an answer may take its time
        if twice is None:
            body.clear()
        VISIT.set(visit)
        try:
            await self.app(scope, inbox, answer)
        finally:
            inbox.close()
            counts = answer.close()
            if counts is not None and not rules.behind.counts:
                tokens().count(self.recipe, counts.before, counts.after)
        if twice is not None and (text := answer.text()) is not None:
            twice.compare(scope, body, text)

    def _written(self, body: dict[str, Any], visit: Visit) -> bytes:
        """A request's body as the server gets it."""
        if self.rules.behind.by_body and visit.ticket is not None:
            options = {ticket.TICKET: visit.ticket} | ({} if visit.keep is None else {ticket.KEEP: visit.keep})
            body = body | {"mm_processor_kwargs": options}
        return json.dumps(body).encode()
