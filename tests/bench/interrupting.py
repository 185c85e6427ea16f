"""Ctrl-C that falls into a finaliser, or reaches another process."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager


class Interrupting:
    """Sends this process Ctrl-C as it is dropped."""

    def __del__(self) -> None:
        signal.raise_signal(signal.SIGINT)


def hear() -> None:
    """In a new process: let Ctrl-C end it, which the background of a shell takes from its commands."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def heard() -> Iterator[None]:
    """In this process, also where its tests run in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
