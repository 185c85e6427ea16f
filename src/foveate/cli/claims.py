"""``foveate claims`` and ``foveate reproduce``: what papers say, and what comes of it here."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import typer

from foveate import checkpoint
from foveate.bench.claims import names, read
from foveate.bench.reproduce import Generated, Lmms, Runner, Setup
from foveate.bench.reproduce import reproduce as work
from foveate.cli.console import diagnostics, output
from foveate.cli.one_line import INTERRUPTED
from foveate.cli.quiet import quiet
from foveate.core.files import make_writable
from foveate.core.recipe import Recipe
from foveate.report.claims_table import claims_overview, claims_table, reproduction_table


def claims(name: str | None) -> None:
    """Print the claims of a system, or what there is of each."""
    shown = claims_overview([read(each) for each in names()]) if name is None else claims_table(read(name))
    output().print(shown)


@dataclass(frozen=True)
class ReproduceRequest:
    """The options of the command, as they were given."""

    name: str
    row: int
    out: Path
    limit: int | None
    tasks: str | None
    resume: bool
    device: str
    dtype: str
    batch_size: int
    companion: str | None
    artifacts: str | None


@quiet()
def reproduce(request: ReproduceRequest) -> None:
    """Run what is missing, and print the claim beside it."""
    wanted = read(request.name).row(request.row)
    if request.tasks is not None:
        wanted = replace(wanted, benchmarks=tuple(filter(None, map(str.strip, request.tasks.split(",")))))
    Recipe.parse(wanted.recipe)
    make_writable(request.out)
    device = checkpoint.resolve_device(request.device)
    dtype = checkpoint.resolve_dtype(request.dtype, device)
    setup = Setup(device, dtype, request.batch_size, request.companion, request.artifacts)
    # Reference models know no benchmark's words; the generated tasks are what they learnt.
    run: Runner = Generated(setup) if wanted.model in checkpoint.REFERENCES else Lmms(setup)

    def told(line: str) -> None:
        diagnostics().print(line, markup=False)

    try:
        found = work(wanted, run, request.out, setup, request.limit, resume=request.resume, told=told)
    except KeyboardInterrupt:
        told(f"foveate: interrupted; the finished runs are in {request.out}, --resume goes on")
        raise typer.Exit(INTERRUPTED) from None
    output().print(reproduction_table(found))
    output().print(request.out / "reproduction.json")
