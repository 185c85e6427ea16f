"""The tables of a bench: one for each task, then the means over tasks.

*Drop* is how many points a method loses to the unmodified model on the same questions, as a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.cells import REFERENCE_POINTS, Key, keep_text
from foveate.bench.records import Record
from foveate.bench.statistics import Difference
from foveate.bench.summary import Mean, kept_everything, pareto
from foveate.report.numbers import NOTHING, factor, fixed, percent, points, seconds, size
from foveate.report.training_mark import footnote, mark

_SCORE = "score % [95 %]"
_RETENTION = "reten-\ntion %"
_DROP = "drop\n[95 %]"
_EVIDENCE = "evi-\ndence %"
_EFFICIENCY = "effi-\nciency"

_WIDEST_METHOD = 30
_ON_FRONT = " *"

Row = TypeVar("Row", Record, Mean)


@dataclass(frozen=True)
class TaskNote:
    """What a table says about its task: the best constant answer with its score, and whether the model knows the task."""

    majority_answer: str
    majority_score: float
    below_floor: bool


def bench_tables(
    records: Sequence[Record],
    means: Sequence[Mean],
    notes: Mapping[str, TaskNote],
    weak: Collection[Record],
    drops: Mapping[Key, Difference],
) -> RenderableType:
    """Everything to show when a bench is done; ``weak`` are the records that do not beat random beyond noise.

    ``drops`` as `foveate.bench.summary.drops` makes them.
    """
    parts: list[RenderableType] = []
    for task, note in notes.items():
        rows = [record for record in records if record.task == task]
        parts += [
            _task_table(task, note, rows, drops),
            *_line("Not better than random beyond noise", [record for record in rows if record in weak]),
            *_line("Kept everything, as there is no more", kept_everything(rows)),
            Text(),
        ]
    front = f"{_ON_FRONT} on the Pareto front: nothing measured is at least as fast and retains at least as much"
    trained = footnote(record.method for record in records)
    below = [front] * bool(means) + [f" {trained}"] * bool(trained)
    return Group(*parts, _means_table(means, notes, drops), *map(Text, below))


def _task_table(task: str, note: TaskNote, records: Sequence[Record], drops: Mapping[Key, Difference]) -> Table:
    title = Text(task, style="bold")
    if note.below_floor:
        title.append(" · below floor", style="yellow")
    title.append(f" · always {note.majority_answer!r} scores {percent(note.majority_score)} %", style="not bold")
    columns = (_SCORE, _RETENTION, _DROP, _EVIDENCE, "tokens", "prefill", "per\nstep", _EFFICIENCY, "KV")
    table = _table(title, columns, [record.method for record in records])
    for section in _by_keep(records):
        for record in section:
            table.add_row(
                Text(record.method + mark(record.method)),
                keep_text(record.keep) or NOTHING,
                f"{percent(record.score)} {points(record.score_low, record.score_high)}",
                percent(record.retention),
                _drop(drops.get(record.key)),
                percent(record.evidence_recall),
                fixed(record.visual_tokens, 1),
                seconds(record.prefill_seconds),
                seconds(record.decode_seconds),
                fixed(record.efficiency, 2),
                size(record.kv_bytes),
                style=_style(record.method),
            )
        table.add_section()
    return table


def _means_table(means: Sequence[Mean], notes: Mapping[str, TaskNote], drops: Mapping[Key, Difference]) -> Table:
    title = Text(f"mean over {len(notes)} task{'s' * (len(notes) > 1)}", style="bold")
    constant = fmean(note.majority_score for note in notes.values())
    title.append(f" · always the same answer scores {percent(constant)} %", style="not bold")
    below = [task for task, note in notes.items() if note.below_floor]
    if below:
        title.append(f" · of these below floor: {', '.join(below)}", style="yellow")
    front = pareto(means)
    # A mean over fewer tasks does not compare with the others.
    named = {
        mean: mean.method
        + mark(mean.method)
        + (f" ({mean.tasks} of {len(notes)} tasks)" if mean.tasks < len(notes) else "")
        + (_ON_FRONT if mean in front else "")
        for mean in means
    }
    columns = ("score %", _RETENTION, _DROP, _EVIDENCE, "tokens", "prefill\nspeed-up", _EFFICIENCY, "KV")
    table = _table(title, columns, named.values())
    for section in _by_keep(means):
        for mean in section:
            table.add_row(
                Text(named[mean]),
                keep_text(mean.keep) or NOTHING,
                percent(mean.score),
                percent(mean.retention),
                _drop(drops.get(mean.key)),
                percent(mean.evidence_recall),
                fixed(mean.visual_tokens, 1),
                factor(mean.speedup),
                fixed(mean.efficiency, 2),
                size(mean.kv_bytes),
                style=_style(mean.method),
            )
        table.add_section()
    return table


def _line(what: str, records: Sequence[Record]) -> list[Text]:
    """Of which methods and budgets something is to be said, in one line; none where there are none."""
    keeps: dict[str, list[str]] = {}
    for record in records:
        keeps.setdefault(record.method, []).append(keep_text(record.keep))
    named = "; ".join(f"{method} at {', '.join(budgets)}" for method, budgets in keeps.items())
    return [Text(f" {what}: {named}", style="yellow")] if records else []


def _drop(drop: Difference | None) -> str:
    return NOTHING if drop is None else points(drop.low, drop.high)


def _table(title: Text, columns: Sequence[str], methods: Iterable[str]) -> Table:
    longest = max(map(len, methods), default=0)
    table = Table(title=title, title_justify="left", title_style="", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("method", min_width=min(longest, _WIDEST_METHOD), overflow="fold")
    table.add_column("keep", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _by_keep(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one budget together, because only those compare; without a budget first."""
    sections: dict[str, list[Row]] = {"": []}
    for row in rows:
        sections.setdefault(keep_text(row.keep), []).append(row)
    return [section for section in sections.values() if section]


def _style(method: str) -> str:
    return "dim" if method in REFERENCE_POINTS else ""
