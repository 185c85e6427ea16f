"""``foveate bench``: from the options to the table, the JSON, the picture and the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import typer
from rich.text import Text

from foveate import checkpoint
from foveate.bench.cells import Cell, parse_keeps, parse_methods, plan
from foveate.bench.folder import TIMED, ResultFolder, Settings
from foveate.bench.measure import measure_with
from foveate.bench.questions import about_data, ask, best_constant, left_out
from foveate.bench.run import run
from foveate.bench.summary import drops, means, no_better_than_random
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import GENERATED, OwnData, task_names, taught
from foveate.cli.progress import BenchProgress
from foveate.core.errors import FoveateError
from foveate.core.files import write_json
from foveate.report.bench_table import TaskNote, bench_tables
from foveate.report.page import write_page
from foveate.report.picture import draw_quality_speed

CELLS_FAILED = 1


@dataclass(frozen=True)
class BenchRequest:
    """The options of the command, as they were given."""

    model: str
    tasks: str | None
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
    data: OwnData = GENERATED
    ray: str | None = None
    workers: int | None = None
    timed: int = TIMED
    artifacts: str | None = None


def bench(request: BenchRequest) -> None:
    """Measure what is missing, show everything."""
    names = task_names(request.tasks, request.data, request.model)
    cells = plan(names, parse_methods(request.methods), parse_keeps(request.keep))
    if request.workers and not request.ray:
        raise FoveateError(f"workers={request.workers}: is for --ray; give both")
    # The workers of a cluster may have a device that this machine lacks; they say so if they do not.
    elsewhere = request.ray and request.device != "auto"
    device = request.device if elsewhere else checkpoint.resolve_device(request.device)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    common = (request.model, request.n, request.seed, device, dtype, request.batch_size, request.companion)
    settings = Settings(*common, request.timed, artifacts=request.artifacts)
    if request.data.path is not None:
        settings = about_data(settings, request.data.path, **request.data.asked())
        request.data.warn(left_out(settings))
    folder = ResultFolder(request.out, settings, resume=request.resume)
    if not all(map(folder.finished, cells)):
        _measure(cells, folder, request)
    _show(folder)
    if folder.failures:
        raise typer.Exit(CELLS_FAILED)


def _measure(cells: Sequence[Cell], folder: ResultFolder, request: BenchRequest) -> None:
    settings, console = folder.settings, diagnostics()
    questions, load = partial(ask, settings), partial(measure_with, settings, cells[0].task)
    missing = sum(not folder.finished(cell) for cell in cells)
    progress = BenchProgress(console, missing, settings.n)
    try:
        if request.ray is None:
            measure = load()
            with progress:
                run(cells, questions, measure, folder, progress)
        else:
            from foveate.bench.parallel import Crew, connected, run_on_ray

            with connected(request.ray) as nodes, progress:
                crew = Crew.fitting(nodes, settings.device, missing, request.workers)
                console.print(f"{crew.workers} workers on Ray; do not quote times that were measured side by side")
                run_on_ray(cells, questions, load, folder, progress, crew)
    except KeyboardInterrupt:
        console.print(f"foveate: interrupted; the finished cells are in {folder.path}, --resume goes on")
        raise typer.Exit(INTERRUPTED) from None


def _show(folder: ResultFolder) -> None:
    console, records = output(), folder.records
    if not records:
        return
    notes = {task: _note(task, folder.settings) for task in dict.fromkeys(record.task for record in records)}
    over_tasks = means(records, folder.speedup)
    weak = no_better_than_random(folder, records)
    console.print(bench_tables(records, over_tasks, notes, weak, drops(folder, records)))
    settings = folder.settings
    counted = f"{len(notes)} task{'s' * (len(notes) > 1)}, {settings.n} questions each"
    title = f"{settings.model}: {counted}, {settings.device} {settings.dtype}"
    draw_quality_speed(over_tasks, folder.path / "quality_speed.png", title)
    write_json(folder.path / "tasks.json", {task: asdict(note) for task, note in notes.items()})
    write_page(folder, folder.path / "report.html")
    written = (folder.path / name for name in ("results.json", "quality_speed.png", "report.html"))
    console.print(Text("\n" + "\n".join(map(str, written))))


def _note(task: str, settings: Settings) -> TaskNote:
    below_floor = settings.data is None and task in _below_floor(settings.model)
    return TaskNote(*best_constant(settings, task), below_floor)


def _below_floor(model: str) -> set[str]:
    """Tasks that a reference model did not learn well enough, by its own evaluation."""
    return {task for task, result in taught(model).items() if result["below_floor"]}
