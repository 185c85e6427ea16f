"""Ctrl-C that falls into a finaliser."""

from __future__ import annotations

import signal


class Interrupting:
    """Sends this process Ctrl-C as it is dropped."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)
