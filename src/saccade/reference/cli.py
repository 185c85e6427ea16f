"""Command line of the reference model: ``train`` and ``evaluate``."""

from __future__ import annotations

import signal
from pathlib import Path
from threading import Event
from typing import Annotated

import typer

app = typer.Typer(help="Train and evaluate the embedded reference model.", no_args_is_help=True)


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

    interrupted = Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    run(folder, Settings(steps=steps, seed=seed, device=device), interrupted.is_set)


@app.command()
def evaluate(
    folder: Annotated[Path | None, typer.Option(help="Checkpoint folder; the shipped one if not given.")] = None,
    questions: Annotated[int, typer.Option(help="Held-out questions per task.")] = 2000,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Score every task and write evaluation.json and the model card into the checkpoint folder."""
    from . import path
    from .evaluate import evaluate as run

    for result in run(folder or path(), questions, device):
        verdict = "below floor" if result.below_floor else "met"
        typer.echo(
            f"{result.task:10} {result.score:6.1%} [{result.low:.1%}, {result.high:.1%}]  majority {result.majority:.1%}  "
            f"blind {result.blind:.1%}  floor {result.floor:.0%} {verdict}"
        )
