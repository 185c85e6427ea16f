"""``foveate methods``: what there is to choose from."""

from __future__ import annotations

import json
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from foveate.cli.console import output
from foveate.core import registry
from foveate.core.description import Description, describe


def methods(*, as_json: bool) -> None:
    """Print every registered method as a table or as JSON."""
    known = [describe(kind) for kind in registry.methods().values()]
    if as_json:
        typer.echo(json.dumps([_entry(about) for about in known], indent=1, ensure_ascii=False))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "group", "protocol", "paper", "needs", "parameters"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "group"))
    for about in sorted(known, key=lambda about: (about.group, about.name)):
        parameters = ", ".join(f"{one.name}={one.default!r}" for one in about.parameters)
        needs = (*(("[yellow]training[/]",) if about.trained else ()), *about.needs)
        table.add_row(
            about.name,
            about.group,
            ", ".join(about.protocols),
            about.paper,
            ", ".join(needs) or "nothing",
            parameters or "none",
        )
    output().print(table)
    output().print("All about one of them: foveate methods NAME")


def _entry(about: Description) -> dict[str, Any]:
    return {
        "name": about.name,
        "title": about.title,
        "summary": about.summary,
        "group": about.group,
        "protocol": list(about.protocols),
        "paper": about.paper,
        "paper_title": about.paper_title,
        "helps": about.helps,
        "trained": about.trained,
        "needs": list(about.needs),
        "parameters": {one.name: one.default for one in about.parameters},
    }
