"""``foveate probe``: what a model does with its visual tokens, as charts and as hints for the tuner."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer
from rich.text import Text

from foveate import checkpoint, tasks
from foveate.bench.probes import Chart, embedlens_run, horizon_run, publish
from foveate.bench.probes.embedlens_run import LensOptions, lens_steps, probe_embedlens
from foveate.bench.probes.horizon_run import HorizonOptions, horizon_steps, probe_horizon
from foveate.bench.probes.kept import Kept
from foveate.bench.questions import Wording
from foveate.checkpoint import Checkpoint
from foveate.checkpoint.arguments import as_text
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.own_data import OwnData, task_names
from foveate.cli.progress import StepProgress
from foveate.cli.quiet import quiet
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable
from foveate.ops.vocabulary import usual_top_k
from foveate.report.probe_picture import draw_probe
from foveate.tasks import Question

Asked = dict[str, list[Question]]


@dataclass(frozen=True)
class ProbeRequest:
    """The options that both probes have, as they were given."""

    model: str
    tasks: str | None
    data: OwnData
    n: int
    seed: int
    out: Path
    device: str
    dtype: str
    batch_size: int
    model_args: str | None
    system: str | None


@quiet()
def information_horizon(request: ProbeRequest, options: HorizonOptions) -> None:
    """From which layer on the visual tokens no longer matter."""
    (asked,) = _asked(request, "test")
    loaded = _load(request)
    kept = _kept(request, horizon_run.PROBE, window=options.window, leave_one_out=options.leave_one_out)
    with _bar(horizon_run.PROBE, horizon_steps(asked, options, loaded.layers)) as bar:
        charts, hints = probe_horizon(loaded, asked, options, kept, bar.advance)
    _show(request, horizon_run.PROBE, charts, {name: getattr(hints, name) for name in horizon_run.HINTS})


@quiet()
def embedlens(request: ProbeRequest, top_k: int | None) -> None:
    """Which visual tokens are sinks, dead and alive."""
    others, asked = _asked(request, "validation", "test")
    # Not the questions with which it is then seen what the kinds are good for.
    pictures = [question for questions in others.values() for question in questions]
    loaded = _load(request)
    top_k = top_k or usual_top_k(loaded.model.get_input_embeddings().num_embeddings)
    options = LensOptions(request.batch_size, top_k, request.seed)
    kept = _kept(request, embedlens_run.PROBE, top_k=top_k, tasks=list(asked))
    with _bar(embedlens_run.PROBE, lens_steps(asked)) as bar:
        charts, hints = probe_embedlens(loaded, pictures, asked, options, kept, bar.advance)
    _show(request, embedlens_run.PROBE, charts, {name: getattr(hints, name) for name in embedlens_run.HINTS})


def _asked(request: ProbeRequest, *splits: str) -> list[Asked]:
    """Questions by task, of each split; of the user's own data, one half of the pictures is for validation."""
    names = task_names(request.tasks, request.data, request.model)
    make_writable(request.out)
    if request.data.path is None:
        worded = Wording.of(request.model, request.data.metric)

        def asked(task: str, split: str) -> list[Question]:
            return [worded(question) for question in tasks.questions(task, request.n, request.seed, split)]

        return [{task: asked(task, split) for task in names} for split in splits]
    arguments = checkpoint.parse_model_args(request.model_args)
    halves = dict(zip(("validation", "test"), request.data.divide(0.5, request.seed, request.model, arguments), strict=True))
    return [{name: halves[split][: request.n] for name in names} for split in splits]


def _load(request: ProbeRequest) -> Checkpoint:
    arguments = checkpoint.parse_model_args(request.model_args)
    device = checkpoint.resolve_device(request.device, arguments)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    loaded = checkpoint.load(request.model, device, dtype, model_args=arguments, system=request.system)
    if not loaded.traits.sees:
        raise FoveateError(
            f"model={request.model!r}: reads text alone, and probes look at the tokens of pictures; foveate bench compares "
            "methods of the cache"
        )
    return loaded


def _kept(request: ProbeRequest, probe: str, **measured: Any) -> Kept:
    settings = {"model": request.model, "n": request.n, "seed": request.seed, "dtype": request.dtype, **measured}
    settings |= {"model_args": as_text(checkpoint.parse_model_args(request.model_args)), "system": request.system}
    settings |= {"metric": request.data.metric, **request.data.describe()}
    return Kept(request.out / "probes" / f"{probe}.json", settings)


@contextmanager
def _bar(probe: str, steps: int) -> Iterator[StepProgress]:
    """Shows how far a probe is, on a terminal; an interruption ends in one line."""
    try:
        with StepProgress(diagnostics()) as bar:
            bar.begin(probe, steps)
            yield bar
    except KeyboardInterrupt:
        diagnostics().print("foveate: interrupted; what is measured is kept, the same command goes on")
        raise typer.Exit(INTERRUPTED) from None


def _show(request: ProbeRequest, probe: str, charts: Sequence[Chart], hints: Mapping[str, Any]) -> None:
    picture = request.out / f"{probe}.png"
    draw_probe(charts, picture, f"{probe} of {request.model}, {request.n} questions a task")
    written = publish(request.out, probe, charts, hints)
    for chart in charts:
        output().print(Text(f"{chart.title}: {chart.caption}\n"))
    output().print(Text(f"{written}\n{picture}"))
