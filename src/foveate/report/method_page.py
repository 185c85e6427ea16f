"""The page of a method, in Markdown: for ``foveate methods NAME`` and for the documentation."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from foveate.core.description import PLACES, Description, describe
from foveate.core.exits import Exits
from foveate.core.leaning import Leaning
from foveate.core.method import Cache, Method, Offline, Routing, Tokens
from foveate.core.reuse import Reuse
from foveate.core.weights import Weights
from foveate.engine.check import minds_inserted
from foveate.engine.hosting import Verdict
from foveate.report.training_mark import NEEDS_TRAINING, footnote, mark

_KEEP = """
`keep` as an integer is a count, as any other number a share. Where it counts by grid, a picture that is shown in tiles keeps
as much of each: with `keep=64`, 128 of two tiles of 144. A count of what is there, or more, keeps everything;
`session.report` and `foveate run` then say that the method changed nothing.
"""

BASELINE = "baseline"
"""Stands for the paper of methods that nobody published."""


def method_page(kind: type[Method], about: Description, known: Mapping[str, type[Method]], where: Sequence[Verdict]) -> str:
    """Everything about a method.

    Args:
        kind: the method.
        about: what it says of itself.
        known: all methods, by name: what it goes with.
        where: on which models it runs.
    """
    return "\n".join(_lines(kind, about, known, where)) + "\n"


def methods_table(methods: Iterable[type[Method]], page: str = "") -> str:
    """All methods in one table, in the order of the places where they act; names link to ``page`` if it is given."""
    place = {group: number for number, group in enumerate(PLACES)}
    order = sorted(map(describe, methods), key=lambda about: (place.get(about.group, len(place)), about.name))
    lines = ["| name | what it does | where | paper |", "|---|---|---|---|"]
    for about in order:
        name = f"[`{about.name}`]({page.format(name=about.name)})" if page else f"`{about.name}`"
        paper = "" if about.paper == BASELINE else about.paper
        summary = cell(about.summary).removesuffix(".")
        lines.append(f"| {name}{mark(about.name)} | {summary} | {about.place} | {link(paper)} |")
    return "\n".join([*lines, "", footnote(about.name for about in order)]) + "\n"


def combinations(kind: type[Method], known: Mapping[str, type[Method]]) -> list[str]:
    """What a method goes with in a recipe, in sentences; `foveate.engine.check` refuses the rest by name."""
    found = []
    if issubclass(kind, Cache):
        others = [f"`{name}`" for name, other in known.items() if issubclass(other, Cache) and other is not kind]
        found.append(f"It owns the cache, which has one owner: not with {', '.join(others)}.")
    if issubclass(kind, Routing):
        others = [f"`{name}`" for name, other in known.items() if issubclass(other, Routing) and other is not kind]
        found.append(f"A layer is routed by one method: with {', '.join(others)} only where they act on different layers.")
    if issubclass(kind, Leaning):
        others = [f"`{name}`" for name, other in known.items() if issubclass(other, Routing | Exits)]
        found.append(f"It adds to attention of whole layers: with {', '.join(others)} only where they act on other layers.")
    if issubclass(kind, Tokens) and kind.inserts:
        others = [f"`{name}`" for name, other in known.items() if minds_inserted(other)]
        found.append(
            f"It puts rows in, which routes and cuts of earlier caches know nothing of: not with {', '.join(others)}."
        )
    if issubclass(kind, Reuse):
        others = [f"`{name}`" for name, other in known.items() if other is not kind and _inside_encoder(other)]
        found.append(
            f"It lets blocks of the encoder run in part, where all rows are wanted: not with {', '.join(others)}. A block "
            "whose attention another method reads runs whole."
        )
    if issubclass(kind, Exits):
        late = [f"`{name}`" for name, other in known.items() if issubclass(other, Routing | Tokens)]
        owners = [f"`{name}`" for name, other in known.items() if issubclass(other, Cache)]
        found.append(
            f"It lets rows leave early, which owners of the cache know nothing of: not with {', '.join(owners)}; with "
            f"{', '.join(late)} only where they act in front of its first exit."
        )
    if issubclass(kind, Tokens) and kind.needs_grid:
        found.append(
            "It needs whole grids: put it first, and not together with methods that drop or merge tokens before it can act."
        )
    elif issubclass(kind, Tokens):
        others = [f"`{name}`" for name, other in known.items() if issubclass(other, Tokens) and other.needs_grid]
        found.append(f"{', '.join(others)} need whole grids: put them first; they are refused where it acts before them.")
    if issubclass(kind, Weights):
        others = [f"`{name}`" for name, other in known.items() if other is not kind and _same_weights(kind, other)]
        found.append(f"Weights are replaced once: not with {', '.join(others)}.")
    return [*found, "It goes with all others."]


def _same_weights(one: type[Weights], other: type[Method]) -> bool:
    return issubclass(other, Weights) and other.part == one.part


def _inside_encoder(kind: type[Method]) -> bool:
    """Whether methods of this kind may drop rows there, or run blocks in part."""
    return issubclass(kind, Reuse) or (issubclass(kind, Tokens) and kind.group in ("before_encoder", "in_encoder"))


def cell(text: str) -> str:
    """Text of a docstring as Markdown in a cell of a table."""
    return text.replace("``", "`").replace("|", "\\|")


def literal(value: Any) -> str:
    """A default as it is written in a recipe."""
    return repr(round(value, 4) if isinstance(value, float) else value)


def link(paper: str) -> str:
    """A paper's number as a link; anything else as it is."""
    found = re.fullmatch(r"arXiv ([\d.]+)", paper)
    return f"[{paper}](https://arxiv.org/abs/{found[1]})" if found else paper


def _lines(
    kind: type[Method], about: Description, known: Mapping[str, type[Method]], where: Sequence[Verdict]
) -> Iterator[str]:
    paper = f"“{about.paper_title}”, {link(about.paper)}" if about.paper_title else link(about.paper)
    yield from (f"# {about.title} (`{about.name}`)", "", f"{about.place[0].upper()}{about.place[1:]} · {paper}", "")
    if about.trained:
        yield from (f"**{NEEDS_TRAINING.capitalize()}:** {about.trained}.", "")
    for paragraph in (f"{about.summary[0].upper()}{about.summary[1:]}", *about.about):
        yield from (cell(paragraph), "")
    yield from ("## When it helps", "", cell(about.helps), "")
    if about.group in PLACES:
        yield from (PLACES[about.group].saves, "")
    yield from ("## Parameters", "", "| parameter | default | may be | meaning |", "|---|---|---|---|")
    for one in about.parameters:
        yield f"| `{one.name}` | `{literal(one.default)}` | {cell(one.values)} | {cell(one.meaning)} |"
    yield ""
    if any(one.name == "keep" for one in about.parameters):
        yield from (_KEEP.strip(), "")
    yield from ("## What it needs", "")
    if about.trained:
        yield "- training (see above)"
    yield from (f"- {need}" for need in about.needs)
    if issubclass(kind, Offline):
        yield f"- `foveate calibrate {about.name}` makes the numbers that it reads of a model, where it reads any"
    if issubclass(kind, Weights):
        yield f"- `foveate quantize {about.name}` makes the weights that it runs on, of those of a model"
    elif not about.needs and not about.trained:
        yield "- nothing"
    yield from ("", "## What it goes with", "")
    yield from (" ".join(combinations(kind, known)), "")
    yield from ("## Where it runs", "")
    runs = [verdict.model for verdict in where if verdict.reason is None]
    yield f"- with its defaults: {', '.join(runs) or 'nowhere'}"
    reasons: dict[str, list[str]] = {}
    for verdict in where:
        if verdict.reason is not None:
            reasons.setdefault(verdict.reason, []).append(verdict.model)
    yield from (f"- not on {', '.join(models)}: {reason}" for reason, models in reasons.items())
