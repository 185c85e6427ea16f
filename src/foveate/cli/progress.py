"""Shows a bench at work: a progress bar on a terminal, a line for each cell elsewhere."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from foveate.bench.cells import Cell
from foveate.bench.records import Failure, Record
from foveate.report.numbers import percent, seconds


class BenchProgress:
    """Watches a run of cells with ``n`` questions each; use as a context manager, and say how many there are."""

    def __init__(self, console: Console, n: int) -> None:
        self._console = console
        self._cells = 0
        self._n = n
        self._done = 0
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[done]}/{task.fields[cells]} cells"),
            TimeElapsedColumn(),
            TextColumn("· left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=None, done=0, cells=0)

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def expect(self, cells: int) -> None:
        """So many cells are to be measured."""
        self._cells = cells
        self._bar.update(self._task, total=cells * self._n, cells=cells)

    def started(self, cell: Cell) -> None:
        """Name the cell at work."""
        self._bar.update(self._task, description=f"{cell}")

    def advanced(self, questions: int) -> None:
        """Move the bar."""
        self._bar.advance(self._task, questions)

    def finished(self, record: Record) -> None:
        """Count the cell; without a terminal say what it came to."""
        self._count()
        if not self._console.is_terminal:
            score, prefill = percent(record.score), seconds(record.prefill_seconds)
            named = " ".join(filter(None, record.key))
            self._console.print(Text(f"[{self._done}/{self._cells}] {named}: {score} %, prefill {prefill}"))

    def failed(self, failure: Failure) -> None:
        """Say which cell failed and why."""
        self._count()
        self._console.print(Text(f"failed: {failure.cell}: {failure.error}", style="red"))

    def _count(self) -> None:
        self._done += 1
        self._bar.update(self._task, completed=self._done * self._n, done=self._done)
