"""The command line, ``foveate``."""

from foveate.cli.app import main

__all__ = ["main"]
