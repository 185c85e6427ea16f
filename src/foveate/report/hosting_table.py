"""The table of ``foveate methods --matrix``: which method runs on which model."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.engine.hosting import Verdict
from foveate.report.training_mark import footnote, mark

WORKS = "✓"


def hosting_table(verdicts: Sequence[Verdict]) -> RenderableType:
    """A mark in each cell, and below what the numbers stand for."""
    numbered = reasons(verdicts)
    title = f"{WORKS} runs with its default parameters; a number is the reason why it is refused"
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", no_wrap=True)
    for model in dict.fromkeys(verdict.model for verdict in verdicts):
        table.add_column(model.replace("_", "_\n", 1), justify="center")
    for method, cells in marks(verdicts).items():
        table.add_row(method + mark(method), *(Text(mark, style="green" if mark == WORKS else "yellow") for mark in cells))
    listed = Table.grid(padding=(0, 2, 0, 0))
    for number, (reason, methods) in enumerate(numbered.items(), start=1):
        listed.add_row(Text(str(number), style="yellow"), Text(f"{', '.join(methods)}: {reason}"))
    return Group(table, listed, *filter(None, [footnote(marks(verdicts))]))


def marks(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """For each method, what stands in the cell of each model: `WORKS`, or the number of the reason."""
    number = {reason: str(place) for place, reason in enumerate(reasons(verdicts), start=1)}
    rows: dict[str, list[str]] = {}
    for verdict in verdicts:
        rows.setdefault(verdict.method, []).append(WORKS if verdict.reason is None else number[verdict.reason])
    return rows


def reasons(verdicts: Sequence[Verdict]) -> dict[str, list[str]]:
    """Each reason once, in the order in which they turn up, with the methods that are refused for it."""
    found: dict[str, list[str]] = {}
    for verdict in verdicts:
        if verdict.reason is not None and verdict.method not in found.setdefault(verdict.reason, []):
            found[verdict.reason].append(verdict.method)
    return found
