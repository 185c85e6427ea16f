"""Shows a tune at work: a line for each trial that is over, and a bar with an estimate of the time that is left."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import TextColumn
from rich.text import Text

from foveate.cli.progress import progress_bar
from foveate.report.tune_table import standing
from foveate.tune.goal import Goal
from foveate.tune.journal import FINISHED, Journal, Tried
from foveate.tune.run import Budget


class TuneProgress:
    """Watches a tune; use as a context manager.

    The search is as far as its time or its trials are, whichever will be used up first; validation as its answers are.
    """

    def __init__(self, console: Console, goal: Goal, budget: Budget, journal: Journal) -> None:
        self._console = console
        self._goal = goal
        self._budget = budget
        self._done = len(journal.tried())
        self._began = time.monotonic() - (journal.remembered("seconds") or 0.0)
        self._searching = True
        self._bar = progress_bar(console, TextColumn("{task.fields[counted]}"))
        self._task = self._bar.add_task("searching", total=1.0, counted=self._trials())
        self._bar.update(self._task, completed=self._searched())

    def __enter__(self) -> TuneProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def answered(self, questions: int) -> None:
        """So many more questions are answered."""
        if self._searching:
            self._bar.update(self._task, completed=self._searched())
        else:
            self._bar.advance(self._task, questions)

    def tried(self, tried: Tried) -> None:
        """What a trial came to."""
        self._done += 1
        self._bar.update(self._task, completed=self._searched(), counted=self._trials())
        end = f": {tried.outcome}" + (f", {tried.why}" if tried.why else "")
        shown = f" · {standing(self._goal, tried.evidence)}" if tried.evidence else ""
        style = "" if tried.outcome == FINISHED else "dim"
        self._console.print(Text(f"#{tried.number} {tried.recipe}{shown}{end}", style=style))

    def validating(self, recipe: str, n: int, answers: int) -> None:
        """Which recipe goes to the held-out questions."""
        self._searching = False
        self._bar.remove_task(self._task)
        self._task = self._bar.add_task("validating", total=answers, counted=f"{n} held-out questions")
        self._console.print(Text(f"{recipe}: {n} held-out questions"))

    def _searched(self) -> float:
        """The share of the search that is over."""
        spent = (time.monotonic() - self._began) / (60 * self._budget.minutes)
        return min(1.0, max(spent, self._done / self._budget.trials if self._budget.trials else 0.0))

    def _trials(self) -> str:
        return f"{self._done} trials"
