"""The table of two results side by side, and what it says of each task."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.compare import Pair, TaskComparison
from foveate.bench.records import Record
from foveate.bench.statistics import Difference
from foveate.report.numbers import factor, percent, points

_WIDEST_METHOD = 40
_STYLES = {"better": "green", "worse": "red"}


def compare_table(compared: Sequence[TaskComparison]) -> RenderableType:
    """A row for each pair of cells, and a line for each task."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("task", overflow="fold")
    table.add_column("method", overflow="fold", max_width=_WIDEST_METHOD)
    for column in ("A %", "B %", "B - A [95 %]", "speed-up\nA", "speed-up\nB"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in compared:
        for pair in each.pairs:
            table.add_row(
                Text(each.task),
                Text(_methods(pair)),
                percent(pair.a.score),
                percent(pair.b.score),
                _points(pair.difference),
                *map(factor, pair.speedups),
            )
        table.add_section()
    return Group(table, *map(_verdict, compared))


def _methods(pair: Pair) -> str:
    a, b = _named(pair.a), _named(pair.b)
    return a if a == b else f"{a} → {b}"


def _named(record: Record) -> str:
    return " ".join(filter(None, record.key[1:]))


def _points(difference: Difference) -> str:
    return f"{100 * difference.mean:+.1f} {points(difference.low, difference.high)}"


def _verdict(each: TaskComparison) -> Text:
    pooled = f", mean of {each.judged} cells" if each.judged > 1 else ""
    said = f"B is {each.verdict}" if each.difference.beyond_noise else each.verdict
    line = Text(f" {each.task}: {said} ({_points(each.difference)} points{pooled})")
    line.stylize(_STYLES.get(each.verdict, "dim"))
    return line
