"""Shows a tune at work: a line for each trial that is over."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from foveate.bench.chance import Chance, chance
from foveate.report.chance_panel import chance_panel
from foveate.report.tune_table import standing
from foveate.tasks import Question, best_constant
from foveate.tune.goal import Goal
from foveate.tune.journal import FINISHED, Tried


class TuneProgress:
    """Watches a tune."""

    def __init__(self, console: Console, goal: Goal) -> None:
        self._console = console
        self._goal = goal
        self.chance: Chance | None = None
        """What is to be said of a model that does no better than always saying the same."""

    def began(self, questions: Sequence[Question], scores: Sequence[float]) -> None:
        """Say first if the unmodified model cannot do what is asked: then no recipe can be judged by it."""
        by_task: dict[str, list[Question]] = {}
        for question in questions:
            by_task.setdefault(question.task, []).append(question)
        constants = {task: best_constant(asked) for task, asked in by_task.items()}
        always = [each.score([constants[each.task]] * len(each.turns)) for each in questions]
        self.chance = chance("all tasks", scores, " / ".join(constants.values()), always)
        for panel in chance_panel([self.chance] if self.chance else []):
            self._console.print(panel)

    def tried(self, tried: Tried) -> None:
        """What a trial came to."""
        end = f": {tried.outcome}" + (f", {tried.why}" if tried.why else "")
        shown = f" · {standing(self._goal, tried.evidence)}" if tried.evidence else ""
        style = "" if tried.outcome == FINISHED else "dim"
        self._console.print(Text(f"#{tried.number} {tried.recipe}{shown}{end}", style=style))

    def validating(self, recipe: str, n: int) -> None:
        """Which recipe goes to the held-out questions."""
        self._console.print(Text(f"{recipe}: {n} held-out questions"))
