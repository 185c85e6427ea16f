"""A server on transformers with the reference model or another one, in a thread of the tests' own process."""

from __future__ import annotations

import asyncio
import socket
import threading

import uvicorn
from tests.serving.door.faults import Client

from foveate import checkpoint
from foveate.serving.door.fallback import app
from foveate.serving.door.rules import Rules


class Served(Client):
    """The server, and ways to talk to it."""

    def __init__(self, rules: Rules, model: str = "reference") -> None:
        self.loaded = checkpoint.load(model, "cpu", "float32")
        self.door = app(self.loaded, rules)
        self._server = uvicorn.Server(uvicorn.Config(self.door, port=0, log_level="critical", timeout_graceful_shutdown=2))
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(self._server.serve([self._socket]))

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)
