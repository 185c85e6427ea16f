"""The table of ``foveate run``: one request without and with a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.statistics import Ratio, ratio
from foveate.core.recipe import NONE
from foveate.core.report import Report, run_lengths
from foveate.report.numbers import NOTHING, factor, seconds, size


@dataclass(frozen=True)
class Answered:
    """One request as it was answered, and what it cost each time.

    ``peak_bytes``: the most memory that was allocated on the model's GPUs, weights included; None without one.
    """

    answer: str
    reports: Sequence[Report]
    peak_bytes: int | None = None


def run_table(runs: Sequence[Answered], device: str, dtype: torch.dtype) -> RenderableType:
    """Answer and cost of each run side by side, the unmodified model first; costs with how they compare to its costs.

    Runs are paired by number: the n-th reports of all were made one right after the other.
    """
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False)
    table.add_column("")
    for run in runs:
        recipe = run.reports[0].recipe
        table.add_column(Text("unmodified" if recipe == NONE else recipe), overflow="fold")
    table.add_row("answer", *(Text(run.answer or NOTHING, style="bold") for run in runs))
    if any(run.reports[0].original_visual_tokens for run in runs):
        table.add_row("visual tokens", *(_tokens(run.reports[0]) for run in runs))
    else:
        table.add_row("tokens in cache", *(_cached(run.reports[0]) for run in runs))
    for cost in _COSTS:
        table.add_row(cost.name, *(cost.shown(run, runs[0]) for run in runs))
    if runs[0].peak_bytes is not None:
        table.add_row("peak memory", *(size(run.peak_bytes) for run in runs))
    return Group(table, Text(_about(runs, device, dtype)))


@dataclass(frozen=True)
class _Cost:
    """A row of the table: ``value`` of a report, None where there is none."""

    name: str
    value: Callable[[Report], float | None]
    show: Callable[[float | None], str]

    def shown(self, run: Answered, plain: Answered) -> str:
        """The median, and beside it how it compares."""
        values = [value for report in run.reports if (value := self.value(report)) is not None]
        text = self.show(median(values) if values else None)
        pairs = [(self.value(before), self.value(after)) for before, after in zip(plain.reports, run.reports, strict=True)]
        known = [before / after for before, after in pairs if before and after]
        return text if run is plain or not known else f"{text} ({_comparison(ratio(known))})"


def _comparison(found: Ratio) -> str:
    """``1.80x less [1.72, 1.95]``; what may as well be nothing is not called less or more."""
    if found.low is None or found.high is None:
        return f"{factor(found.value)} less" if found.value >= 1 else f"{factor(1 / found.value)} more"
    if found.low <= 1 <= found.high and found.low < found.high:
        return f"no difference beyond noise: [{found.low:.2f}, {found.high:.2f}]"
    value, low, high = found.value, found.low, found.high
    if value < 1:
        value, low, high = 1 / value, 1 / high, 1 / low
    between = f" [{low:.2f}, {high:.2f}]" if f"{low:.2f}" != f"{high:.2f}" else ""
    return f"{factor(value)} {'less' if found.value >= 1 else 'more'}{between}"


def _about(runs: Sequence[Answered], device: str, dtype: torch.dtype) -> str:
    times = len(runs[0].reports)
    what = "medians and 95 % intervals of paired ratios" if times > 1 else "one time only, so no ratio has an interval"
    name = str(dtype).removeprefix("torch.")
    return (
        f"One question at a time on {device}, {name}; answered {times}x in turn: {what}. First token: from entering "
        "generate to its logits, encoder and methods included. Prefill: the language model's."
    )


def _tokens(report: Report) -> str:
    """``144 → 32``, or ``144 → 144 (layers 0-1), 72 (layers 2-7)`` where a method inside the decoder drops."""
    return f"{report.original_visual_tokens:g} → {run_lengths(report.visual_tokens)}"


def _cached(report: Report) -> str:
    """``20 %``, or ``100 (layers 0-1), 20 (layers 2-7) %``: share of all tokens, of the answer too, held at the end."""
    return f"{run_lengths(tuple(round(100 * share, 1) for share in report.kv_kept))} %"


def _per_token(report: Report) -> float | None:
    return report.decode_seconds / report.decode_steps if report.decode_steps else None


def _with_rate(value: float | None) -> str:
    """``20.0 ms, 50.0 tokens/s``."""
    return f"{seconds(value)}, {1 / value:.1f} tokens/s" if value else seconds(value)


_COSTS = (
    _Cost("first token", lambda report: report.first_token_seconds, seconds),
    _Cost("  of it encode", lambda report: report.encode_seconds, seconds),
    _Cost("  of it prefill", lambda report: report.prefill_seconds, seconds),
    _Cost("    of it the methods", lambda report: report.method_seconds, seconds),
    _Cost("per token after it", _per_token, _with_rate),
    _Cost("whole answer", lambda report: report.total_seconds, seconds),
    _Cost("KV cache", lambda report: sum(report.kv_bytes), size),
)
