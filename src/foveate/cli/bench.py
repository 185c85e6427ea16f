"""``foveate bench``: from the options to the table, the JSON, the picture and the page."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean

import typer
from rich.text import Text

from foveate import checkpoint
from foveate.bench.admission import Refusals, admitted
from foveate.bench.cells import PICTURE_POINTS, TEXT_POINTS, Cell, parse_keeps, parse_methods, plan, spread_out
from foveate.bench.chance import chance
from foveate.bench.difficulty import difficulties
from foveate.bench.folder import TIMED, ResultFolder, Settings
from foveate.bench.machine import device_name
from foveate.bench.measure import Bench
from foveate.bench.questions import Wording, about_data, ask, best_constant, left_out
from foveate.bench.run import run
from foveate.bench.summary import drops, means, no_better_than_random
from foveate.checkpoint.arguments import as_text
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import GENERATED, OwnData, reads_text, task_names
from foveate.cli.progress import BenchProgress
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable, write_json
from foveate.core.recipe import NONE
from foveate.report.across import across
from foveate.report.bench_table import TaskNote, bench_tables
from foveate.report.page import write_page
from foveate.report.picture import draw_quality
from foveate.tasks import VIDEOS

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
    model_args: str | None = None
    system: str | None = None
    films: bool = False


@quiet()
def bench(request: BenchRequest) -> None:
    """Measure what is missing, show everything."""
    names = task_names(request.tasks, request.data, request.model)
    keeps = parse_keeps(request.keep)
    named = parse_methods(request.methods)
    methods, left_out_early = spread_out(named, keeps)
    arguments = checkpoint.parse_model_args(request.model_args)
    cells = plan(names, methods, keeps, TEXT_POINTS if reads_text(request.model, arguments) else PICTURE_POINTS)
    if request.workers and not request.ray:
        raise FoveateError(f"workers={request.workers}: is for --ray; give both")
    # The workers of a cluster may have a device that this machine lacks; they say so if they do not.
    elsewhere = request.ray and request.device != "auto"
    device = request.device if elsewhere else checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    common = (request.model, request.n, request.seed, device, dtype, request.batch_size, request.companion)
    settings = Settings(
        *common, request.timed, artifacts=request.artifacts, model_args=as_text(arguments), system=request.system
    )
    if request.films and not set(names) <= set(VIDEOS):
        other = ", ".join(name for name in names if name not in VIDEOS)
        raise FoveateError(f"films: {other} shows no video; --films is for --tasks {','.join(VIDEOS)}")
    settings = replace(settings, films=request.films)
    make_writable(request.out)
    if request.data.path is not None:
        settings = about_data(settings, request.data.path, **request.data.asked())
        request.data.warn(left_out(settings))
    else:
        wording = Wording.of(request.model, request.data.metric)
        settings = replace(settings, metric=wording.metric, short=wording.short)
    folder = ResultFolder(request.out, settings, resume=request.resume)
    for name, reason in left_out_early.items():
        _say(f"left out: {name}: {reason}")
    if not all(map(folder.finished, cells)):
        _measure(cells, folder, request, named)
    _show(folder)
    if folder.failures:
        raise typer.Exit(CELLS_FAILED)


def _measure(cells: Sequence[Cell], folder: ResultFolder, request: BenchRequest, named: Collection[str]) -> None:
    settings, console = folder.settings, diagnostics()
    questions, load = partial(ask, settings), partial(Bench.load, settings, cells[0].task)
    progress = BenchProgress(console, settings.n)

    def admit(planned: Sequence[Cell], refusals: Refusals) -> Sequence[Cell]:
        """Ahead of any work."""
        taken = admitted(planned, refusals, named, _say)
        progress.expect(sum(not folder.finished(cell) for cell in taken))
        return taken

    try:
        if request.ray is None:
            model = load()
            taken = admit(cells, model.refusals)
            with progress:
                run(taken, questions, model, folder, progress)
        else:
            from foveate.bench.parallel import Crew, connected, run_on_ray

            with connected(request.ray) as nodes, progress:
                missing = sum(not folder.finished(cell) for cell in cells)
                crew = Crew.fitting(nodes, settings.device, missing, request.workers)
                console.print(f"{crew.workers} workers on Ray; do not quote times that were measured side by side")
                run_on_ray(cells, questions, load, folder, progress, crew, admit)
    except KeyboardInterrupt:
        console.print(f"foveate: interrupted; the finished cells are in {folder.path}, --resume goes on")
        raise typer.Exit(INTERRUPTED) from None


def _say(line: str) -> None:
    diagnostics().print(line, markup=False)


def _show(folder: ResultFolder) -> None:
    console, records = output(), folder.records
    if not records:
        return
    notes = {task: _note(task, folder) for task in dict.fromkeys(record.task for record in records)}
    over_tasks = means(records, folder.pairs)
    weak = no_better_than_random(folder, records)
    settings = folder.settings
    about = (
        f"{settings.model} on {device_name(settings.device)}, {settings.dtype}; {settings.n} questions a task in batches of "
        f"{settings.batch_size} (conversations one by one), {settings.timed} batches of each cell timed"
    )
    apart = difficulties(folder, records)
    console.print(bench_tables(records, over_tasks, notes, weak, drops(folder, records), about, apart))
    counted = f"{len(notes)} task{'s' * (len(notes) > 1)}, {settings.n} questions each"
    title = f"{settings.model}: {counted}, {settings.device} {settings.dtype}"
    axis = across(records)
    draw_quality(over_tasks, folder.path / axis.file, title, axis)
    write_json(folder.path / "tasks.json", {task: asdict(note) for task, note in notes.items()})
    write_json(folder.path / "difficulty.json", [asdict(each) for each in apart])
    write_page(folder, folder.path / "report.html")
    written = (folder.path / each for each in ("results.json", axis.file, "report.html"))
    console.print(Text("\n" + "\n".join(map(str, written))))


def _note(task: str, folder: ResultFolder) -> TaskNote:
    settings = folder.settings
    below_floor = settings.data is None and task in _below_floor(settings.model)
    constant, scores = best_constant(settings, task)
    plain, found = folder.record((task, NONE, "")), None
    if plain is not None:
        answers = folder.answers(plain)
        found = chance(task, [answer.score for answer in answers], constant, scores, answers)
    return TaskNote(constant, fmean(scores), below_floor, found)


def _below_floor(model: str) -> set[str]:
    """Tasks that a reference model did not learn well enough, by its own evaluation."""
    return {task for task, result in checkpoint.evaluation(model).items() if result["below_floor"]}
