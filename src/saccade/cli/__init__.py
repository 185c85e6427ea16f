"""The command line, ``saccade``."""

from saccade.cli.app import main

__all__ = ["main"]
