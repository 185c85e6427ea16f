"""What work in progress shows: a bar with counts and an estimate on a terminal, and no bar elsewhere."""

from __future__ import annotations

from io import StringIO
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from foveate.cli.progress import StepProgress
from foveate.cli.tune_progress import TuneProgress
from foveate.tune.goal import Goal
from foveate.tune.journal import FINISHED, Tried
from foveate.tune.run import Budget


def screen(terminal: bool = True) -> Console:
    return Console(file=StringIO(), force_terminal=terminal, width=100, color_system=None)


def shown(console: Console) -> str:
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def journal(tried: int = 0, seconds: float = 0.0) -> Any:
    return SimpleNamespace(tried=lambda: [None] * tried, remembered=lambda name: seconds)


def test_steps_are_counted_under_the_name_of_what_is_done() -> None:
    console = screen()
    with StepProgress(console) as progress:
        progress.begin("reading", 3)
        progress.advance()
        progress.begin("training", 40)
        progress.advance(10)
        progress._bar.refresh()

    assert "reading" in shown(console)
    assert "10/40" in shown(console)
    assert "· left" in shown(console)


def test_there_is_no_bar_without_a_terminal() -> None:
    console = screen(terminal=False)
    with StepProgress(console) as progress:
        progress.begin("reading", 3)
        progress.advance()

    assert shown(console) == ""


@pytest.mark.parametrize(
    ("budget", "kept", "share"),
    [
        (Budget(10, None, 5), journal(seconds=150), 0.25),
        (Budget(10, 8, 5), journal(tried=3, seconds=60), 0.5),
        (Budget(10, 4, 5), journal(tried=9, seconds=60), 1.0),
    ],
    ids=["time", "trials", "over"],
)
def test_a_search_is_as_far_as_what_is_used_up_first(budget: Budget, kept: Any, share: float) -> None:
    """What an earlier run in the folder took counts."""
    progress = TuneProgress(screen(), Goal("prefill", "drop", 0.02), budget, kept)
    progress.tried(Tried(0, "snapkv(keep=0.5)", FINISHED, "", None))

    assert progress._bar.tasks[0].completed == pytest.approx(share, abs=0.01)


def test_validation_counts_its_answers() -> None:
    console = screen()
    with TuneProgress(console, Goal("prefill", "drop", 0.02), Budget(10, None, 5), journal()) as progress:
        progress.validating("snapkv(keep=0.5)", 50, 100)
        progress.answered(30)
        progress._bar.refresh()
        (task,) = progress._bar.tasks

    assert (task.completed, task.total) == (30, 100)
    assert "50 held-out questions" in shown(console)
