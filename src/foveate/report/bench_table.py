"""The tables of a bench: one for each task, then the means over tasks, quality and cost apart.

*Drop* is how many points a method loses to the unmodified model on the same questions, as a 95 % interval.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.console import Group as Parts
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from foveate.bench.cells import REFERENCE_POINTS, Key, keep_text
from foveate.bench.chance import Chance
from foveate.bench.difficulty import LEAST, Difficulty, Group
from foveate.bench.records import Record
from foveate.bench.statistics import Difference
from foveate.bench.summary import Mean, kept_everything, pareto
from foveate.report.chance_panel import chance_panel
from foveate.report.numbers import NOTHING, between, fixed, percent, points, seconds, size
from foveate.report.training_mark import footnote, mark

_SCORE = "score % [95 %]"
_RETENTION = "retained\n%"
_DROP = "drop\n[95 %]"
_EVIDENCE = "evidence\n%"
_EFFICIENCY = "of\nlimit"
_PEAK = "peak\nmemory"

_WIDEST_METHOD = 24
_ON_FRONT = " *"

_WORDS = (
    f"{_ON_FRONT} on the Pareto front: nothing measured has at least its prefill's speed-up and retains at least as much.\n"
    "Seconds are those of a whole batch. First token: from entering generate to its logits, with encoder and what methods "
    "compute; of it prefill: the language model's; whole answer: until the longest of the batch has ended; tokens/s: in "
    "decoding, all of a batch together. Speed-ups are medians of pairs, a batch under both, one after the other; over tasks "
    "the geometric mean. Of limit: the time of the plain layers on just the live rows over that of the prefill."
)

Row = TypeVar("Row", Record, Mean, Difficulty)


@dataclass(frozen=True)
class TaskNote:
    """What a table says about its task: the best constant answer with its score, and whether the model knows the task.

    below_floor: a reference model did not learn it well enough, by its own evaluation.
    chance: what is to be said of a model that does no better here than that constant answer.
    """

    majority_answer: str
    majority_score: float
    below_floor: bool
    chance: Chance | None = None


def bench_tables(
    records: Sequence[Record],
    means: Sequence[Mean],
    notes: Mapping[str, TaskNote],
    weak: Collection[Record],
    drops: Mapping[Key, Difference],
    about: str,
    apart: Sequence[Difficulty] = (),
) -> RenderableType:
    """Everything to show when a bench is done; ``weak`` are the records that do not beat random beyond noise.

    ``drops`` as `foveate.bench.summary.drops` makes them, ``apart`` as
    `foveate.bench.difficulty.difficulties` does; ``about``: model, device and batches in a line.
    """
    parts = chance_panel([note.chance for note in notes.values() if note.chance])
    parts += [Text(f"{about}\n")]
    for task, note in notes.items():
        rows = [record for record in records if record.task == task]
        parts += [
            _task_table(task, note, rows, drops),
            *_line("Not better than random beyond noise", [record for record in rows if record in weak]),
            *_line("Kept everything, as there is no more", kept_everything(rows)),
            Text(),
        ]
    trained = footnote(record.method for record in records)
    below = [_WORDS, *([f" {trained}"] if trained else [])]
    return Parts(*parts, *(_means_tables(means, notes, drops) if means else []), *_difficulty(apart), *map(Text, below))


def _task_table(task: str, note: TaskNote, records: Sequence[Record], drops: Mapping[Key, Difference]) -> Table:
    title = Text(task, style="bold")
    if note.below_floor:
        title.append(" · below floor", style="yellow")
    title.append(f" · always {note.majority_answer!r} scores {percent(note.majority_score)} %", style="not bold")
    if note.chance:
        title.append(" · the model does no better than that", style="bold red")
    columns = (_SCORE, _DROP, _EVIDENCE, "tokens", "first\ntoken", "of it\nprefill", "whole\nanswer", "tokens\n/s", "KV")
    table = _table(title, columns, [record.method for record in records])
    for section in _by_keep(records):
        for record in section:
            table.add_row(
                Text(record.method + mark(record.method)),
                keep_text(record.keep) or NOTHING,
                f"{percent(record.score)} {points(record.score_low, record.score_high)}",
                _drop(drops.get(record.key)),
                percent(record.evidence_recall),
                fixed(record.visual_tokens, 1),
                seconds(record.first_token_seconds),
                seconds(record.prefill_seconds),
                seconds(record.total_seconds),
                fixed(record.decode_rate, 0),
                size(record.kv_bytes),
                style=_style(record.method),
            )
        table.add_section()
    return table


def _means_tables(
    means: Sequence[Mean], notes: Mapping[str, TaskNote], drops: Mapping[Key, Difference]
) -> list[RenderableType]:
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
    quality = _table(Text(), ("score %", _RETENTION, _DROP, _EVIDENCE, "tokens", "KV"), named.values())
    peaks = any(mean.peak_bytes is not None for mean in means)
    columns = (
        *(f"{what}\nspeed-up [95 %]" for what in ("first token", "prefill", "whole answer")),
        "tokens\n/s",
        _EFFICIENCY,
    )
    cost = _table(Text("the same: cost", style="bold"), (*columns, *([_PEAK] if peaks else [])), named.values())
    for section in _by_keep(means):
        for mean in section:
            name, keep, style = Text(named[mean]), keep_text(mean.keep) or NOTHING, _style(mean.method)
            quality.add_row(
                name,
                keep,
                percent(mean.score),
                percent(mean.retention),
                _drop(drops.get(mean.key)),
                percent(mean.evidence_recall),
                fixed(mean.visual_tokens, 1),
                size(mean.kv_bytes),
                style=style,
            )
            cost.add_row(
                name,
                keep,
                between(mean.first_token_speedup, mean.first_token_speedup_low, mean.first_token_speedup_high),
                between(mean.speedup, mean.speedup_low, mean.speedup_high),
                between(mean.total_speedup, mean.total_speedup_low, mean.total_speedup_high),
                fixed(mean.decode_rate, 0),
                fixed(mean.efficiency, 2),
                *([size(mean.peak_bytes)] if peaks else []),
                style=style,
            )
        quality.add_section()
        cost.add_section()
    return [title, quality, cost]


def _difficulty(apart: Sequence[Difficulty]) -> list[RenderableType]:
    """How methods score on questions that a smaller picture still answers, and on those that only the full one does."""
    known = [row for row in apart if row.simple or row.difficult]
    if not known:
        return []
    by = " or ".join(dict.fromkeys(row.by for row in known))
    title = Text("the same: by difficulty", style="bold")
    title.append(f" · difficult is what the unmodified model answers and {by} at that budget does not", style="not bold")
    table = _table(
        Text(), ("simple\nscore %", "[95 %]", "n", "difficult\nscore %", "[95 %]", "n"), [row.method for row in known]
    )
    for section in _by_keep(known):
        for row in section:
            groups = (cell for group in (row.simple, row.difficult) for cell in _group(group))
            table.add_row(row.method + mark(row.method), keep_text(row.keep), *groups, style=_style(row.method))
        table.add_section()
    return [title, table]


def _group(group: Group | None) -> tuple[str, str, str]:
    if group is None:
        return NOTHING, NOTHING, f"< {LEAST}"
    return percent(group.score), points(group.low, group.high), str(group.n)


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
