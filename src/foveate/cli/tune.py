"""``foveate tune``: from the options to the recipe that keeps its promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from foveate import checkpoint, tasks
from foveate.bench.cells import ALL, PICTURE_POINTS, TEXT_POINTS
from foveate.bench.probes import Hints
from foveate.bench.probes.charts import PROBES_FILE
from foveate.bench.questions import Wording
from foveate.checkpoint.arguments import as_text
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import OwnData, reads_text, task_names
from foveate.cli.quiet import quiet
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable
from foveate.core.recipe import NONE
from foveate.engine.hosting import verdicts

if TYPE_CHECKING:
    from foveate.tune.goal import Goal
    from foveate.tune.run import Ask

_SEARCHED = 1 / 3
"""Share of the pictures of a data file that the search may use; the promise needs more questions than the search."""


@dataclass(frozen=True)
class TuneRequest:
    """The options of the command, as they were given."""

    model: str
    max_drop: float | None
    target: str | None
    max_kv: float | None
    max_prefill: float | None
    tasks: str | None
    data: OwnData
    methods: str
    compose: bool
    minutes: float
    trials: int | None
    rungs: str
    validate: int
    hints: Path | None
    seed: int
    out: Path
    resume: bool
    device: str
    dtype: str
    batch_size: int
    companion: str | None
    artifacts: str | None = None
    model_args: str | None = None
    system: str | None = None


@quiet()
def tune(request: TuneRequest) -> None:
    """Search, validate, show."""
    if find_spec("optuna") is None:
        raise FoveateError("tune: needs Optuna; pip install 'foveate[tune]'")
    from foveate.cli.tune_progress import TuneProgress
    from foveate.report.tune_table import tune_table
    from foveate.tune.answer import ModelAnswers
    from foveate.tune.run import Budget, Folder, Settings
    from foveate.tune.run import tune as work

    of_text = reads_text(request.model)
    goal, names = parse_goal(request, of_text), parse_names(request.methods, of_text)
    asked = tuple(task_names(request.tasks, request.data, request.model))
    wording = None
    if request.data.path is None:
        make_writable(request.out)
        wording = Wording.of(request.model, request.data.metric)
    searched, held = questions(request, wording)
    make_writable(request.out)
    hints = read_hints(request.hints)
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    rungs = parse_rungs(request.rungs)
    beside = (request.companion, request.artifacts, arguments, request.system)
    loaded = checkpoint.load(request.model, device, dtype, *beside)
    hosted, left_out = split(names, loaded)
    refused = [name for name in request.methods.replace(" ", "").split(",") if name in left_out]
    if refused:
        raise FoveateError(
            f"methods={refused[0]!r}: {left_out[refused[0]]}; leave it out, or --methods all takes those that run"
        )
    settings = Settings(
        request.model, asked, hosted, goal, request.compose, request.seed, device, dtype, request.batch_size,
        request.companion, rungs, **(asdict(wording) if wording else request.data.describe()),
        artifacts=request.artifacts, model_args=as_text(arguments), system=request.system,
    )  # fmt: skip
    folder = Folder(request.out, settings, resume=request.resume)
    console = diagnostics()
    for name, reason in left_out.items():
        console.print(f"left out: {name}: {reason}", markup=False)
    budget = Budget(request.minutes, request.trials, request.validate)
    progress = TuneProgress(console, goal, budget, folder.journal)
    answer = ModelAnswers(loaded, request.batch_size, request.seed, progress.answered)
    try:
        with progress:
            result = work(folder, loaded.traits, budget, hints, answer, searched, held, progress)
    except KeyboardInterrupt:
        console.print(f"foveate: interrupted; the finished trials are in {folder.path}, --resume goes on", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    folder.conclude(result, left_out, progress.chance)
    output().print(tune_table(goal, result, max(rungs), progress.chance))
    for name in ("recipe.yaml", "evidence.json", "trials.json"):
        output().print(folder.path / name)


def parse_goal(request: TuneRequest, of_text: bool) -> Goal:
    """What to find, from the one bound that is given."""
    from foveate.tune.goal import DROP, Goal

    bounds = {DROP: request.max_drop, "kv": request.max_kv, "prefill": request.max_prefill}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if len(given) != 1:
        raise FoveateError("tune: give one bound: --max-drop 0.02, --max-kv 0.25 or --max-prefill 0.5")
    ((bounded, bound),) = given.items()
    if bounded != DROP and request.target is not None:
        raise FoveateError(f"target={request.target!r}: goes with --max-drop; --max-{bounded} asks for the best quality")
    if bounded == DROP and request.target is None and of_text:
        return Goal("kv", bounded, bound)  # what acts on a text model's cache reads the whole prompt first
    return Goal((request.target or "prefill") if bounded == DROP else DROP, bounded, bound)


def read_hints(folder: Path | None) -> Hints:
    """The hints in a folder in which probes ran."""
    if folder is None:
        return Hints()
    if not (folder / PROBES_FILE).is_file():
        raise FoveateError(f"hints={str(folder)!r}: holds no {PROBES_FILE}; run foveate probe there, or leave it out")
    return Hints.load(folder)


def parse_names(text: str, of_text: bool) -> tuple[str, ...]:
    """Names of methods from a list separated by commas; ``all`` are all.

    The baselines are always among them, those of text models where ``of_text``.
    """
    named = [name.strip() for name in text.split(",") if name.strip()]
    if not named:
        raise FoveateError(f"methods={text!r}: names none; must be names separated by commas, or all")
    if ALL in named:
        named = list(registry.methods())
    baselines = [name for name in (TEXT_POINTS if of_text else PICTURE_POINTS) if name != NONE]
    return tuple(registry.get(name).name for name in dict.fromkeys([*named, *baselines]))


def parse_rungs(text: str) -> tuple[int, ...]:
    """Ascending numbers of questions from a list separated by commas."""
    try:
        rungs = tuple(int(rung) for rung in text.split(","))
    except ValueError:
        rungs = ()
    if not rungs or any(low >= high for low, high in zip((0, *rungs), rungs)):
        raise FoveateError(f"rungs={text!r}: must be ascending numbers of questions, such as 50,200,800")
    return rungs


def split(names: Sequence[str], loaded: checkpoint.Checkpoint) -> tuple[tuple[str, ...], dict[str, str]]:
    """Which methods the model hosts, and why it does not host the others."""
    found = verdicts({loaded.name: loaded.model}, loaded.companion is not None, loaded.artifacts)
    left_out = {v.method: v.reason for v in found if v.reason is not None and v.method in names}
    return tuple(name for name in names if name not in left_out), left_out


def questions(request: TuneRequest, wording: Wording | None) -> tuple[Ask, Ask]:
    """Those of the search, and those held out: generated ones without end, or a third and the rest of the user's own."""
    if wording is not None:
        return partial(_draw, wording, request.seed, "validation"), partial(_draw, wording, request.seed, "test")
    arguments = checkpoint.parse_model_args(request.model_args)
    searched, held = request.data.divide(_SEARCHED, request.seed, request.model, arguments)
    return partial(_take, searched), partial(_take, held)


def _draw(worded: Wording, seed: int, part: str, task: str, start: int, stop: int) -> list[tasks.Question]:
    return [worded(tasks.question(task, seed, index, part)) for index in range(start, stop)]


def _take(part: Sequence[tasks.Question], task: str, start: int, stop: int) -> Sequence[tasks.Question]:
    return part[start:stop]
