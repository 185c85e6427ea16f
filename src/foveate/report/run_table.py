"""The table of ``foveate run``: one request without and with a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from foveate.core.report import Report, run_lengths
from foveate.report.numbers import NOTHING, factor, seconds, size


@dataclass(frozen=True)
class Answered:
    """One request as it was answered."""

    answer: str
    report: Report


def run_table(runs: Sequence[Answered]) -> Table:
    """Answer and cost of each run side by side, the unmodified model first; costs with their share of its cost."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for run in runs:
        table.add_column(Text("unmodified" if run.report.recipe == "none" else run.report.recipe), overflow="fold")
    table.add_row("answer", *(Text(run.answer or NOTHING, style="bold") for run in runs))
    table.add_row("visual tokens", *(_tokens(run.report) for run in runs))
    for name, value, show in _COSTS:
        first = value(runs[0].report)
        table.add_row(name, *(_cost(value(run.report), first if run is not runs[0] else None, show) for run in runs))
    return table


def _tokens(report: Report) -> str:
    """``144 → 32``, or ``144 → 144 (layers 0-1), 72 (layers 2-7)`` where a method inside the decoder drops."""
    return f"{report.original_visual_tokens:g} → {run_lengths(report.visual_tokens)}"


def _cost(value: float | None, base: float | None, show: Callable[[float | None], str]) -> str:
    if not value or not base:
        return show(value)
    change = f"{factor(base / value)} less" if value <= base else f"{factor(value / base)} more"
    return f"{show(value)} ({change})"


def _per_token(report: Report) -> float | None:
    return report.decode_seconds / report.decode_steps if report.decode_steps else None


_COSTS: tuple[tuple[str, Callable[[Report], float | None], Callable[[float | None], str]], ...] = (
    ("encode", lambda report: report.encode_seconds, seconds),
    ("prefill", lambda report: report.prefill_seconds, seconds),
    ("  of it the methods", lambda report: report.method_seconds, seconds),
    ("per token", _per_token, seconds),
    ("KV cache", lambda report: sum(report.kv_bytes), size),
)
