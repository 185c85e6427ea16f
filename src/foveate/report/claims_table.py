"""Tables of what papers claim, and of a claim beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.claims import Claim, Claims
from foveate.bench.reproduce import Reproduction
from foveate.report.numbers import NOTHING, factor, fixed


def claims_overview(known: Sequence[Claims]) -> RenderableType:
    """A line for each system: how many rows there are, or why there are none."""
    table = _table("system", "rows", "what it claims first, or why nothing")
    for each in known:
        first = each.nothing if not each.rows else _short(each.rows[0])
        table.add_row(each.system, str(len(each.rows)), Text(first))
    return table


def claims_table(claims: Claims) -> RenderableType:
    """The rows of a system, with notes below."""
    head = Text(f"{claims.system}: figures of {claims.source}", style="bold")
    if not claims.rows:
        return Group(head, Text(f"claims nothing that can be reproduced: {claims.nothing}"))
    table = _table("row", "model", "recipe", "benchmarks", "tokens", "kept %", "speed-up", "hardware", "table")
    notes = []
    for number, row in enumerate(claims.rows, start=1):
        table.add_row(
            str(number),
            row.model.partition("/")[2] or row.model,
            Text(row.recipe),
            ", ".join(row.benchmarks) or "not named",
            _tokens(row),
            fixed(row.kept_percent, 1),
            _speedups(row),
            row.hardware or NOTHING,
            row.table or NOTHING,
        )
        notes += [Text(f" {number}: {row.note}")] if row.note else []
    return Group(head, table, *notes)


def reproduction_table(found: Reproduction) -> RenderableType:
    """The claim in one column, what was measured in the other."""
    said, table = found.claim, _table("", "claimed", "measured")
    table.add_row(
        "score kept, %",
        fixed(said.kept_percent, 1),
        f"{found.kept:.1f} [{found.low:.1f}, {found.high:.1f}] of {found.n} questions",
    )
    table.add_row("visual tokens, mean over layers", _tokens(said), f"{found.tokens:.1f} of {found.of:.1f}")
    table.add_row("prefill speed-up", factor(said.speedup.get("prefill")), factor(found.prefill_speedup))
    for name, value in said.speedup.items():
        if name != "prefill":
            table.add_row(f"{name.replace('_', ' ')} speed-up", factor(value), NOTHING)
    words = f"{said.model} under {said.recipe}, {', '.join(said.benchmarks)}"
    notes = [Text(f" of the claim: {note}") for note in (said.hardware, said.table, said.note) if note]
    return Group(Text(words, style="bold"), table, *notes, Text(f" {found.verdict}", style="bold"))


def _short(row: Claim) -> str:
    kept = f"{fixed(row.kept_percent, 1)} % kept" if row.kept_percent is not None else _speedups(row)
    return f"{row.model.partition('/')[2]}, {row.recipe}: {kept}"


def _tokens(row: Claim) -> str:
    if row.tokens is None:
        return NOTHING
    return f"{row.tokens:g} of {row.of:g}" if row.of else f"{row.tokens:g}"


def _speedups(row: Claim) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {factor(value)}" for name, value in row.speedup.items()) or NOTHING


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table
