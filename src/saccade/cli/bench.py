"""``saccade bench``: from the options to the table, the JSON and the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from statistics import fmean

import typer
from rich.text import Text

from saccade import reference, tasks
from saccade.bench import checkpoint
from saccade.bench.cells import Cell, parse_keeps, parse_methods, plan
from saccade.bench.folder import ResultFolder, Settings
from saccade.bench.measure import measure
from saccade.bench.run import run
from saccade.bench.summary import means, no_better_than_random
from saccade.cli.console import diagnostics, output
from saccade.cli.one_line import INTERRUPTED
from saccade.cli.progress import BenchProgress
from saccade.core.errors import SaccadeError
from saccade.report.bench_table import TaskNote, bench_tables
from saccade.report.picture import draw_quality_speed

CELLS_FAILED = 1


@dataclass(frozen=True)
class BenchRequest:
    """The options of the command, as they were given."""

    model: str
    tasks: str
    methods: str
    keep: str
    n: int
    seed: int
    out: Path
    resume: bool
    device: str
    dtype: str
    batch_size: int
    companion: str | None


def bench(request: BenchRequest) -> None:
    """Measure what is missing, show everything."""
    cells = plan(parse_tasks(request.tasks), parse_methods(request.methods), parse_keeps(request.keep))
    device = checkpoint.resolve_device(request.device)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    settings = Settings(request.model, request.n, request.seed, device, dtype, request.batch_size, request.companion)
    folder = ResultFolder(request.out, settings, resume=request.resume)
    missing = [cell for cell in cells if not folder.finished(cell)]
    if missing:
        _measure(missing, folder)
    _show(folder)
    if folder.failures:
        raise typer.Exit(CELLS_FAILED)


def parse_tasks(text: str) -> Sequence[str]:
    """Task names from a list separated by commas; ``all`` are all."""
    if text.strip() == "all":
        return tasks.SPINE
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in tasks.TASKS:
            close = get_close_matches(name, tasks.TASKS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"must be all or some of {', '.join(tasks.TASKS)}"
            raise SaccadeError(f"tasks={name!r}: {hint}")
    return names


def _measure(cells: Sequence[Cell], folder: ResultFolder) -> None:
    settings, console = folder.settings, diagnostics()
    loaded = checkpoint.load(settings.model, settings.device, settings.dtype, settings.companion)
    try:
        with BenchProgress(console, len(cells), settings.n) as progress:
            run(cells, partial(_questions, settings), partial(measure, loaded, settings), folder, progress)
    except KeyboardInterrupt:
        console.print(f"saccade: interrupted; the finished cells are in {folder.path}, --resume goes on")
        raise typer.Exit(INTERRUPTED) from None


def _show(folder: ResultFolder) -> None:
    console, records = output(), folder.records
    if not records:
        return
    notes = {task: _note(task, folder.settings) for task in dict.fromkeys(record.task for record in records)}
    over_tasks = means(records, folder.speedup)
    console.print(bench_tables(records, over_tasks, notes, no_better_than_random(folder, records)))
    settings = folder.settings
    title = f"{settings.model}: {len(notes)} tasks, {settings.n} questions each, {settings.device} {settings.dtype}"
    draw_quality_speed(over_tasks, folder.path / "quality_speed.png", title)
    console.print(Text(f"\n{folder.path / 'results.json'}\n{folder.path / 'quality_speed.png'}"))


def _questions(settings: Settings, task: str) -> list[tasks.Question]:
    return tasks.questions(task, settings.n, settings.seed)


def _note(task: str, settings: Settings) -> TaskNote:
    constant = tasks.majority(task)
    share = fmean(each.score([constant] * len(each.turns)) for each in _questions(settings, task))
    return TaskNote(constant, share, task in _below_floor(settings.model))


def _below_floor(model: str) -> set[str]:
    """Tasks that a reference model did not learn well enough, by its own evaluation."""
    if model not in reference.MODELS:
        return set()
    return {task for task, result in reference.evaluation(reference.path(model)).items() if result["below_floor"]}
