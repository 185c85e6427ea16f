"""``foveate methods NAME``: everything about one method."""

from __future__ import annotations

import json
from dataclasses import asdict

import typer
from rich.markdown import Markdown

from foveate.cli.console import output
from foveate.core import registry
from foveate.core.description import describe
from foveate.engine.hosting import by_family
from foveate.report.method_page import combinations, method_page


def method(name: str, *, as_json: bool) -> None:
    """Print what the method called ``name`` does, takes, needs and goes with, and where it runs."""
    kind, known = registry.get(name), registry.methods()
    about, where = describe(kind), by_family(name)
    if as_json:
        models = [{"model": each.model, "works": each.reason is None, "reason": each.reason} for each in where]
        entry = asdict(about) | {"place": about.place, "combinations": combinations(kind, known), "models": models}
        typer.echo(json.dumps(entry, indent=1, ensure_ascii=False))
    else:
        output().print(Markdown(method_page(kind, about, known, where)))
