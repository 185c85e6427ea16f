"""``foveate methods --matrix``: what runs where."""

from __future__ import annotations

import json

import typer

from foveate import checkpoint
from foveate.cli.console import output
from foveate.engine.hosting import Verdict, by_family, verdicts
from foveate.report.hosting_table import hosting_table


def matrix(model: str | None, artifacts: str | None = None, *, as_json: bool) -> None:
    """Print which methods run on each family, or on the ``model`` of that name."""
    found = by_family() if model is None else _of_model(model, artifacts)
    if as_json:
        entries = [{"method": v.method, "model": v.model, "works": v.reason is None, "reason": v.reason} for v in found]
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
    else:
        output().print(hosting_table(found))


def _of_model(name: str, artifacts: str | None) -> list[Verdict]:
    # Nothing is computed, so the memory is what counts.
    loaded = checkpoint.load(name, "cpu", "bfloat16", artifacts=artifacts)
    return verdicts({name: loaded.model}, loaded.companion is not None, loaded.artifacts)
