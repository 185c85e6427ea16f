"""Shows a tune at work: a line for each trial that is over."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from foveate.report.tune_table import standing
from foveate.tune.goal import Goal
from foveate.tune.journal import FINISHED, Tried


class TuneProgress:
    """Watches a tune."""

    def __init__(self, console: Console, goal: Goal) -> None:
        self._console = console
        self._goal = goal

    def tried(self, tried: Tried) -> None:
        """What a trial came to."""
        end = f": {tried.outcome}" + (f", {tried.why}" if tried.why else "")
        shown = f" · {standing(self._goal, tried.evidence)}" if tried.evidence else ""
        style = "" if tried.outcome == FINISHED else "dim"
        self._console.print(Text(f"#{tried.number} {tried.recipe}{shown}{end}", style=style))

    def validating(self, recipe: str, n: int) -> None:
        """Which recipe goes to the held-out questions."""
        self._console.print(Text(f"{recipe}: {n} held-out questions"))
