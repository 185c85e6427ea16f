"""``foveate methods --matrix``: what runs where."""

from __future__ import annotations

import json

import typer

from foveate import checkpoint
from foveate.cli.console import output
from foveate.cli.quiet import quiet
from foveate.engine.hosting import Verdict, by_family, verdicts
from foveate.report.hosting_table import hosting_table


@quiet()
def matrix(model: str | None, model_args: str | None, *, as_json: bool) -> None:
    """Print which methods run on each family, or on the ``model`` of that name."""
    found = by_family() if model is None else _of_model(model, model_args)
    if as_json:
        entries = [{"method": v.method, "model": v.model, "works": v.reason is None, "reason": v.reason} for v in found]
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        output().print(hosting_table(found))


def _of_model(name: str, model_args: str | None) -> list[Verdict]:
    # Nothing is computed, so the memory is what counts.
    loaded = checkpoint.load(name, "cpu", "bfloat16", model_args=checkpoint.parse_model_args(model_args))
    return verdicts({name: loaded.model}, companion=loaded.companion is not None)
