"""Where the command line writes: results to stdout, progress and trouble to stderr."""

from __future__ import annotations

from rich.console import Console

_LEAST_WIDTH = 120
"""Narrower, and the widest tables would lose columns; a terminal that wraps their lines loses nothing."""


def output() -> Console:
    """The console for results."""
    console = Console(highlight=False)
    console.width = max(console.width, _LEAST_WIDTH)
    return console


def diagnostics() -> Console:
    """The console for progress and trouble."""
    return Console(stderr=True, highlight=False, soft_wrap=True)
