"""``foveate methods``: what there is to choose from."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields
from typing import Any

import typer
from rich.box import SIMPLE_HEAD
from rich.table import Table

from foveate.cli.console import output
from foveate.core import registry
from foveate.core.method import Method, protocols


def methods(*, as_json: bool) -> None:
    """Print every registered method as a table or as JSON."""
    entries = [_entry(kind) for kind in registry.methods().values()]
    if as_json:
        typer.echo(json.dumps(entries, indent=1, ensure_ascii=False))
        return
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in ("name", "group", "protocol", "paper", "needs", "parameters"):
        table.add_column(column, overflow="fold", no_wrap=column in ("name", "group"))
    for entry in sorted(entries, key=lambda entry: (entry["group"], entry["name"])):
        parameters = ", ".join(f"{name}={value!r}" for name, value in entry["parameters"].items())
        table.add_row(
            entry["name"],
            entry["group"],
            ", ".join(entry["protocol"]),
            entry["paper"],
            ", ".join(entry["needs"]) or "nothing",
            parameters or "none",
        )
    output().print(table)


def _entry(kind: type[Method]) -> dict[str, Any]:
    return {
        "name": kind.name,
        "title": kind.title,
        "group": kind.group,
        "protocol": list(protocols(kind)),
        "paper": kind.paper,
        "needs": list(kind.needs),
        "parameters": {field.name: None if field.default is MISSING else field.default for field in fields(kind)},
    }
