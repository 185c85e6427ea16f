"""Shows work in progress: a bar on a terminal with an estimate of the time that is left; a bench elsewhere a line a cell."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from foveate.bench.cells import Cell
from foveate.bench.records import Failure, Record
from foveate.report.numbers import percent, seconds

_ESTIMATE_SECONDS = 1800


def progress_bar(console: Console, count: ProgressColumn) -> Progress:
    """A bar between what is done and ``count``, then the time it took and the time that is left; only on a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        count,
        TimeElapsedColumn(),
        TextColumn("· left"),
        TimeRemainingColumn(),
        console=console,
        # A batch may take minutes, and an estimate needs several of them.
        speed_estimate_period=_ESTIMATE_SECONDS,
        transient=True,
        disable=not console.is_terminal,
    )


class StepProgress:
    """Shows one thing after the other, each of so many steps; use as a context manager."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = progress_bar(console, TextColumn("{task.completed}/{task.total}"))
        self._task: TaskID | None = None

    def __enter__(self) -> StepProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def begin(self, what: str, steps: int) -> None:
        """Show what is done from now on."""
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(what, total=steps)

    def advance(self, steps: int = 1) -> None:
        """Move the bar."""
        assert self._task is not None
        self._bar.advance(self._task, steps)


class BenchProgress:
    """Watches a run of ``cells`` cells with ``n`` questions each; use as a context manager."""

    def __init__(self, console: Console, cells: int, n: int) -> None:
        self._console = console
        self._cells = cells
        self._n = n
        self._done = 0
        self._bar = progress_bar(console, TextColumn("{task.fields[done]}/{task.fields[cells]} cells"))
        self._task = self._bar.add_task("", total=cells * n, done=0, cells=cells)

    def __enter__(self) -> BenchProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

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
