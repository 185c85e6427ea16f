"""Command line of the reference models: ``train``, ``extend``, ``smol`` and ``evaluate``."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

from foveate.cli.one_line import OneLineErrors
from foveate.core.errors import FoveateError

app = typer.Typer(
    cls=OneLineErrors,
    help="Train and evaluate the reference models.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@app.command()
def train(
    folder: Annotated[Path, typer.Option(help="Where state, log and export go; a run found there is continued.")],
    steps: Annotated[int, typer.Option(help="Steps of the curriculum; the last third cools down.")] = 1930,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train the model, or continue a run, and export the checkpoint. Ctrl-C stops after the current step."""
    from .train import Settings
    from .train import train as run

    run(folder, Settings(steps=steps, seed=seed, device=device), _interrupted().is_set)


@app.command()
def extend(
    kind: Annotated[str, typer.Argument(metavar="KIND", help="tiles (as LLaVA-NeXT) or qwen (as Qwen2.5-VL).")],
    folder: Annotated[Path, typer.Option(help="Where state, log and export go; a run found there is continued.")],
    steps: Annotated[int, typer.Option(help="Training steps; the last two fifths cool down.")] = 1500,
    start: Annotated[
        list[Path] | None, typer.Option(help="Checkpoints to begin with, later on top; the small model if not given.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 2e-3,
    gain: Annotated[float, typer.Option(help="Factor on the projector's output at the start.")] = 1.0,
    teacher: Annotated[
        Path | None, typer.Option(help="Checkpoint of the model with tiles whose vision tower the qwen model's imitates.")
    ] = None,
    looking: Annotated[int, typer.Option(min=0, help="Steps at the beginning in which the vision tower learns alone.")] = 0,
    large_from: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the steps after which large pictures come, too.")
    ] = 0.15,
    seed: Annotated[int, typer.Option(help="Seed of weights and data.")] = 0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Train one of the larger models, or continue a run, and export it. Ctrl-C stops after the current step."""
    from foveate.reference import path

    from .extended import KINDS
    from .school import Settings, school

    if kind not in KINDS:
        raise FoveateError(f"kind={kind!r}: must be one of {', '.join(KINDS)}")
    if teacher is not None and KINDS[kind].tiled:
        raise FoveateError(
            f"teacher={str(teacher)!r}: is for the qwen model; the one with tiles starts from a trained tower"
        )
    if teacher is not None and not (teacher / "config.json").is_file():
        raise FoveateError(f"teacher={str(teacher)!r}: must be a checkpoint folder")
    learning = {"rate": rate, "gain": gain, "teacher": teacher, "looking": looking, "large_from": large_from}
    settings = Settings(kind, steps, tuple(start or [path()]), **learning, seed=seed, device=device)
    school(folder, settings, _interrupted().is_set)


@app.command()
def smol(
    folder: Annotated[Path, typer.Option(help="Where the log and what is learnt go.")],
    steps: Annotated[int, typer.Option(min=1, help="Steps with adapters.")] = 600,
    start: Annotated[
        Path | None, typer.Option(help="Folder of an earlier run to begin with; from nothing if not given.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    cooling: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the steps over which the rate falls.")] = 0.6,
    hard: Annotated[float, typer.Option(min=0, max=1, help="Share of questions on counting, position, reading.")] = 0.4,
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights and data.")] = 0,
) -> None:
    """Teach SmolLM2 to see through the small model's vision tower (about an hour and a half on one core)."""
    from foveate.checkpoint import reference_smol

    from .smol import Settings
    from .smol import train as run

    if start is not None and not (start / reference_smol.FILE).is_file():
        raise FoveateError(f"start={str(start)!r}: must be the folder of an earlier run, with {reference_smol.FILE}")
    run(folder, Settings(steps=steps, rate=rate, cooling=cooling, hard=hard, seed=seed), start)


@app.command()
def evaluate(
    folder: Annotated[
        Path | None, typer.Option(help="Checkpoint folder, or one of `smol`; the small model's if not given.")
    ] = None,
    questions: Annotated[int, typer.Option(help="Held-out questions per task.")] = 2000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Score every task and write evaluation.json and the model card into the checkpoint folder."""
    from foveate.reference import path

    from .evaluate import evaluate as run

    for result in run(folder or path(), questions, device):
        verdict = "below floor" if result.below_floor else "met"
        typer.echo(
            f"{result.task:10} {result.score:6.1%} [{result.low:.1%}, {result.high:.1%}]  majority {result.majority:.1%}  "
            f"blind {result.blind:.1%}  floor {result.floor:.0%} {verdict}"
        )


def _interrupted() -> Event:
    """Set once the process is asked to stop."""
    interrupted = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    return interrupted
