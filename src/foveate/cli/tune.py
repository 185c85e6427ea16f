"""``foveate tune``: from the options to the recipe that keeps its promise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from foveate import checkpoint, tasks
from foveate.bench.cells import REFERENCE_POINTS
from foveate.bench.probes import Hints
from foveate.bench.probes.charts import PROBES_FILE
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import OwnData, task_names
from foveate.core import registry
from foveate.core.errors import FoveateError
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


def tune(request: TuneRequest) -> None:
    """Search, validate, show."""
    if find_spec("optuna") is None:
        raise FoveateError("tune: needs Optuna; pip install 'foveate[tune]'")
    from foveate.cli.tune_progress import TuneProgress
    from foveate.report.tune_table import tune_table
    from foveate.tune.answer import ModelAnswers
    from foveate.tune.run import Budget, Folder, Settings
    from foveate.tune.run import tune as work

    goal = parse_goal(request)
    names, asked = parse_names(request.methods), tuple(task_names(request.tasks, request.data, request.model))
    searched, held = questions(request)
    hints = read_hints(request.hints)
    device = checkpoint.resolve_device(request.device)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    rungs = parse_rungs(request.rungs)
    loaded = checkpoint.load(request.model, device, dtype, request.companion, request.artifacts)
    hosted, left_out = split(names, loaded)
    settings = Settings(
        request.model, asked, hosted, goal, request.compose, request.seed, device, dtype, request.batch_size,
        request.companion, rungs, **request.data.describe(), artifacts=request.artifacts,
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
    folder.conclude(result, left_out)
    output().print(tune_table(goal, result, max(rungs)))
    for name in ("recipe.yaml", "evidence.json", "trials.json"):
        output().print(folder.path / name)


def parse_goal(request: TuneRequest) -> Goal:
    """What to find, from the one bound that is given."""
    from foveate.tune.goal import DROP, Goal

    bounds = {DROP: request.max_drop, "kv": request.max_kv, "prefill": request.max_prefill}
    given = {name: bound for name, bound in bounds.items() if bound is not None}
    if len(given) != 1:
        raise FoveateError("tune: give one bound: --max-drop 0.02, --max-kv 0.25 or --max-prefill 0.5")
    ((bounded, bound),) = given.items()
    if bounded != DROP and request.target is not None:
        raise FoveateError(f"target={request.target!r}: goes with --max-drop; --max-{bounded} asks for the best quality")
    return Goal((request.target or "prefill") if bounded == DROP else DROP, bounded, bound)


def read_hints(folder: Path | None) -> Hints:
    """The hints in a folder in which probes ran."""
    if folder is None:
        return Hints()
    if not (folder / PROBES_FILE).is_file():
        raise FoveateError(f"hints={str(folder)!r}: holds no {PROBES_FILE}; run foveate probe there, or leave it out")
    return Hints.load(folder)


def parse_names(text: str) -> tuple[str, ...]:
    """Names of methods from a list separated by commas, the baselines always among them; ``all`` are all."""
    named = list(registry.methods()) if text.strip() == "all" else [name.strip() for name in text.split(",")]
    baselines = [name for name in REFERENCE_POINTS if name != NONE]
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


def questions(request: TuneRequest) -> tuple[Ask, Ask]:
    """Those of the search, and those held out: generated ones without end, or a third and the rest of the user's own."""
    if request.data.path is None:
        return partial(_draw, request.seed, "validation"), partial(_draw, request.seed, "test")
    searched, held = request.data.divide(_SEARCHED, request.seed, request.model)
    return partial(_take, searched), partial(_take, held)


def _draw(seed: int, part: str, task: str, start: int, stop: int) -> list[tasks.Question]:
    return [tasks.question(task, seed, index, part) for index in range(start, stop)]


def _take(part: Sequence[tasks.Question], task: str, start: int, stop: int) -> Sequence[tasks.Question]:
    return part[start:stop]
