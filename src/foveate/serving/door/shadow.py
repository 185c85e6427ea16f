"""A share of the requests runs a second time with all tokens, in the background: are the answers the same?"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any

from foveate.serving import ticket
from foveate.serving.door.answer import Answer
from foveate.serving.door.asgi import App, Message, Scope
from foveate.serving.door.metrics import metrics
from foveate.serving.door.visit import VISIT, Inbox, Visit
from foveate.serving.settings import FULL

_LOG = logging.getLogger(__name__)
AT_A_TIME = 2
"""Shadows that run at once; others are left out, so that they never are the reason why clients wait long."""


class Shadow:
    """Runs requests again.

    Attributes:
        share: of those that can be compared.
        recipe: under which name answers are counted.
    """

    def __init__(self, app: App, share: float, recipe: str, write: Callable[[dict[str, Any], Visit], bytes]) -> None:
        self.share, self.recipe = share, recipe
        self._app, self._write = app, write
        self._running: set[asyncio.Task[None]] = set()

    def wants(self, body: dict[str, Any], keep: object) -> bool:
        """Whether a request is to be answered twice: one of the share, and greedy, as others differ by chance."""
        greedy = body.get("temperature") == 0 and body.get("n", 1) in (None, 1)
        return greedy and keep != FULL and random.random() < self.share

    def compare(self, scope: Scope, body: dict[str, Any], text: str) -> None:
        """Start the second run of a request whose answer was ``text``, unless enough are running."""
        if len(self._running) >= AT_A_TIME:
            return
        again = {name: value for name, value in body.items() if name != "stream_options"} | {"stream": False}
        task = asyncio.create_task(self._run(scope, again, text))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _run(self, scope: Scope, body: dict[str, Any], text: str) -> None:
        visit = Visit(FULL, ticket.draw())
        answer = Answer(_nowhere, visit.ticket, copied=True)
        try:
            VISIT.set(visit)
            raw = self._write(body, visit)
            await self._app(with_length(scope, len(raw)), Inbox(raw, None, lambda: None), answer)
            full = answer.text()
            if full is None:
                _LOG.warning("shadow: no answer with all tokens (status %s)", answer.status)
                return
            metrics().shadows.labels(self.recipe).inc()
            metrics().equal.labels(self.recipe).inc(full == text)
        # Nobody waits for it.
        except Exception:
            _LOG.exception("shadow: failed")
        finally:
            answer.close()


async def _nowhere(message: Message) -> None:
    pass


def with_length(scope: Scope, length: int) -> Scope:
    """The request with a body of another length."""
    others = [(name, value) for name, value in scope["headers"] if name not in (b"content-length", b"transfer-encoding")]
    return {**scope, "headers": [*others, (b"content-length", str(length).encode())]}
