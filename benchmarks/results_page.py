"""The pages about the results, and the file of numbers that they are written from.

``docs/results.md`` is to be read: what is best at which speed, then a narrow table for each place in the model.
``docs/results/<model>.md`` has every task by itself.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from foveate.bench.cells import REFERENCE_POINTS, keep_text
from foveate.bench.summary import Mean
from foveate.core.recipe import NONE
from foveate.report.picture import draw_quality
from foveate.report.places import by_place
from foveate.report.training_mark import footnote, mark

SPEEDS = (1.1, 1.5, 2.0, 3.0, 5.0)
"""Where one class of speed ends and the next begins."""
_BEST = 3
"""Methods shown of each class."""


class Task(NamedTuple):
    """What always giving the best constant answer scores, and whether the model has not learnt the task well enough."""

    majority: float
    below_floor: bool


class Cell(NamedTuple):
    """A score with its 95 % interval, and 1 if it is better than that of ``random`` beyond noise, -1 if worse, else 0."""

    score: float
    low: float
    high: float
    against_random: int


@dataclass(frozen=True)
class Row:
    """A method at a budget: its means over the tasks that the model has learnt, and every task."""

    mean: Mean
    cells: Mapping[str, Cell]

    @property
    def verdicts(self) -> Counter[int]:
        """How often it is better (1) and worse (-1) than ``random``."""
        return Counter(cell.against_random for cell in self.cells.values())


@dataclass(frozen=True)
class Numbers:
    """All about one series of rows on a model, ``""`` for the first; ``refused``: why methods do not run on the model."""

    model: str
    series: str
    about: str
    n: int
    device: str
    dtype: str
    tasks: Mapping[str, Task]
    refused: Mapping[str, str]
    rows: Sequence[Row]

    @property
    def title(self) -> str:
        """Of its section."""
        return f"{self.model}: {self.about}" if self.about else self.model

    @property
    def stem(self) -> str:
        """What its files are called."""
        return f"{self.model}-{self.series}" if self.series else self.model

    @property
    def learnt(self) -> list[str]:
        """The tasks that are not below floor."""
        return [name for name, task in self.tasks.items() if not task.below_floor]


def write(numbers: Numbers, path: Path) -> None:
    """Write the numbers as JSON lines: what all rows have in common, then a line for each."""
    common = {name: value for name, value in vars(numbers).items() if name != "rows"}
    common["tasks"] = {name: task._asdict() for name, task in numbers.tasks.items()}
    rows = [{**_rounded(asdict(row.mean)), "cells": _rounded(dict(row.cells))} for row in numbers.rows]
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in (common, *rows)))


def read(path: Path) -> Numbers:
    """The numbers of a file that `write` wrote."""
    common, *rows = map(json.loads, path.read_text().splitlines())
    tasks = {name: Task(**task) for name, task in common.pop("tasks").items()}
    return Numbers(**common, tasks=tasks, rows=list(map(_row, rows)))


def _row(content: dict[str, Any]) -> Row:
    cells = {task: Cell(*cell) for task, cell in content.pop("cells").items()}
    return Row(Mean(**content), cells)


def _rounded(value: Any) -> Any:
    """Four digits behind the point are plenty."""
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    if isinstance(value, tuple):
        return [_rounded(each) for each in value]
    return round(value, 4) if isinstance(value, float) else value


def write_pages(docs: Path, measured: Sequence[Numbers]) -> list[Path]:
    """Write the page to read, and for each model its page with every task and its picture."""
    (docs / "results").mkdir(exist_ok=True)
    written = {docs / "results.md": _front_page(measured)}
    for numbers in measured:
        title = f"{numbers.model}: {len(numbers.learnt)} tasks, {numbers.n} questions each, {numbers.device} {numbers.dtype}"
        draw_quality([row.mean for row in _complete(numbers)], docs / "results" / f"{numbers.stem}.png", title)
        written[docs / "results" / f"{numbers.stem}.md"] = _task_page(numbers)
    for path, lines in written.items():
        path.write_text("\n".join(lines) + "\n")
    return list(written)


# The page to read.


def _front_page(measured: Sequence[Numbers]) -> Iterator[str]:
    yield from (
        "# Results",
        "",
        "Every registered method on the reference models, on the same questions for all of a section: the first methods at",
        "three budgets, those that came later, with fewer questions and at one budget, in a section of their own.",
        "Written by `python -m benchmarks.results`.",
        "",
        "- **retained**: score over the unmodified model's, mean over the tasks that the model has learnt, ± half the 95 %",
        "  interval.",
        "- **speed-up**: of the language model's prefill, timed right beside the unmodified model, mean over tasks. Other",
        "  cells may have been measured on other cores meanwhile: these times are rough ([efficiency.md](efficiency.md) has",
        "  steady ones).",
        "- **keep**: share of the visual tokens; of cached entries for methods on the KV cache, which read the whole prompt",
        "  before they drop any; of what each layer works on for `alvts`, which drops nothing. With `sparsevila` decoding",
        "  reads a quarter of what `keep` leaves. Methods without `keep` have three settings.",
        "- **random**: on how many tasks a method is better and worse than random selection at the same budget, beyond",
        "  noise (paired bootstrap); without `keep`, at the largest budget of `random` that is as fast.",
        "- **evidence**: share of the patches that hold the answer entering the last layer.",
        "- **cache**: bytes behind the answer, over the unmodified model's. What `keep` is a share of differs from method",
        "  to method ([keep.md](keep.md)), so compare by this.",
    )
    trained = footnote(row.mean.method for numbers in measured for row in numbers.rows)
    if trained:
        yield f"- {trained}, and these models were not."
    yield from (
        "",
        "The models are small: what a method does to their answers says more about where it looks than about the loss on a",
    )
    yield "large model."
    for numbers in measured:
        yield from ("", f"## {numbers.title}", "", *_model(numbers))


def _model(numbers: Numbers) -> Iterator[str]:
    name = f"results/{numbers.stem}"
    plain = next(row.mean for row in numbers.rows if row.mean.method == NONE)
    yield f"{len(numbers.learnt)} tasks ({', '.join(numbers.learnt)}), n = {numbers.n} questions each, {numbers.device}"
    yield f"{numbers.dtype}. The unmodified model scores {100 * plain.score:.0f} %."
    yield f"Every task by itself: [{name}.md]({name}.md)."
    yield from (
        "",
        "### Best at each speed",
        "",
        "What methods on the KV cache save is memory and time of decoding, not of the prefill.",
        "",
    )
    yield from _speed_table(_complete(numbers))
    yield from ("", f"![Score retained against prefill speed-up, a panel for each place]({name}.png)")
    baselines = [row for row in numbers.rows if row.mean.method in REFERENCE_POINTS]
    yield from ("", "### Baselines", "", *_place_table(baselines, plain))
    for place, rows in by_place(numbers.rows, lambda row: row.mean.method).items():
        yield from ("", f"### {place[0].upper()}{place[1:]}", "", *_place_table(rows, plain))
    if numbers.refused:
        yield from ("", f"Not on this model: {', '.join(f'`{method}`' for method in numbers.refused)} ([why]({name}.md)).")


def _complete(numbers: Numbers) -> list[Row]:
    """Those over all tasks, which compare."""
    return [row for row in numbers.rows if row.mean.tasks == len(numbers.learnt)]


def _speed_table(rows: Sequence[Row]) -> Iterator[str]:
    """The methods that retain most in each class of speed, each once, and the best baseline there."""
    yield from ("| prefill | method | keep or settings | retained | speed-up |", "|---|---|---|--:|--:|")
    for low, high in zip((0.0, *SPEEDS), (*SPEEDS, float("inf"))):
        inside = [row.mean for row in rows if low <= row.mean.speedup < high and row.mean.method != NONE]
        ranked = sorted(inside, key=lambda mean: mean.retention or 0.0, reverse=True)
        best: dict[str, Mean] = {}
        for mean in ranked:
            if mean.method not in REFERENCE_POINTS:
                best.setdefault(mean.method.partition("(")[0], mean)
        baseline = next((mean for mean in ranked if mean.method in REFERENCE_POINTS), None)
        shown = [*list(best.values())[:_BEST], *([baseline] if baseline else [])]
        for number, mean in enumerate(shown):
            cells = (
                f"**{_class(low, high)}**" if number == 0 else "",
                *_named(mean),
                _retained(mean),
                f"{mean.speedup:.1f}×",
            )
            yield f"| {' | '.join(cells)} |"


def _class(low: float, high: float) -> str:
    if not low:
        return f"no faster (below {high:g}×)"
    return f"{low:g}× and more" if high == float("inf") else f"{low:g}× to {high:g}×"


def _place_table(rows: Sequence[Row], plain: Mean) -> Iterator[str]:
    """The methods of a place, the one that retains most at its ample budget first."""
    yield "| method | keep or settings | retained | speed-up | cache | evidence | random |"
    yield "|---|---|--:|--:|--:|--:|---|"
    methods: dict[str, list[Row]] = {}
    for row in rows:
        methods.setdefault(row.mean.method.partition("(")[0], []).append(row)
    for those in sorted(methods.values(), key=lambda each: -max(row.mean.retention or 0.0 for row in each)):
        for row in those:
            mean, counts = row.mean, row.verdicts
            baseline = mean.method in REFERENCE_POINTS
            against = "" if baseline else f"{counts[1]} better, {counts[-1]} worse"
            evidence = "–" if mean.evidence_recall is None else f"{100 * mean.evidence_recall:.0f} %"
            cells = (_retained(mean), f"{mean.speedup:.1f}×", cache_share(mean, plain), evidence, against)
            yield f"| {' | '.join((*_named(mean), *cells))} |"


def _named(mean: Mean) -> tuple[str, str]:
    """The method, and its budget or what stands in its place."""
    keep = keep_text(mean.keep)
    method, _, settings = (mean.method, "", "") if keep else mean.method.partition("(")
    name = f"`{method}`{mark(mean.method)}"
    budget = keep or (f"`{settings.removesuffix(')')}`" if settings else "")
    return f"*{name}*" if mean.method in REFERENCE_POINTS else name, budget


def cache_share(mean: Mean, plain: Mean) -> str:
    """Bytes of the cache over the unmodified model's."""
    return f"{100 * mean.kv_bytes / plain.kv_bytes:.0f} %" if mean.kv_bytes and plain.kv_bytes else "–"


def _retained(mean: Mean) -> str:
    if mean.retention is None or mean.retention_low is None or mean.retention_high is None:
        return "–"
    return f"{100 * mean.retention:.0f} ± {50 * (mean.retention_high - mean.retention_low):.0f} %"


# The page with every task.


def _task_page(numbers: Numbers) -> Iterator[str]:
    below = [name for name, task in numbers.tasks.items() if task.below_floor]
    yield from (f"# {numbers.title}, task by task", "")
    yield "Scores in percent ± half the 95 % interval. **Bold**: better than `random` at the same budget beyond noise"
    yield "(paired bootstrap); *italic*: worse. *Evidence*: the share of the patches with the answer that enter the last"
    yield "layer. *Of limit*: what the speed-up is of the physical limit, a model that never had the other tokens. What the"
    yield "rest means and what it comes to: [results.md](../results.md)."
    yield from ("", f"n = {numbers.n} questions a task, {numbers.device} {numbers.dtype}.")
    if below:
        yield f"Below floor, that is not learnt well enough to measure methods on: {', '.join(below)}."
    for keep in dict.fromkeys(keep_text(row.mean.keep) for row in numbers.rows):
        rows = [row for row in numbers.rows if keep_text(row.mean.keep) == keep]
        yield from ("", f"## {f'keep {keep}' if keep else 'Without a budget'}", "", *_wide_table(numbers, rows))
    yield from ("", "## Against random selection", "", "All tasks and budgets.", "", *_random_table(numbers))
    if numbers.refused:
        yield from ("", "## Not on this model", "", *(f"- `{method}`: {why}" for method, why in numbers.refused.items()))


def _wide_table(numbers: Numbers, rows: Sequence[Row]) -> Iterator[str]:
    heads = [f"{name} (below floor)" if task.below_floor else name for name, task in numbers.tasks.items()]
    yield f"| method | {' | '.join(heads)} | evidence | speed-up | of limit |"
    yield "|---|" + "--:|" * (len(heads) + 3)
    if not keep_text(rows[0].mean.keep):
        constants = [f"{100 * task.majority:.0f}" for task in numbers.tasks.values()]
        yield f"| always the same answer | {' | '.join(constants)} | | | |"
    for row in rows:
        cells = [_cell(row.cells.get(task)) for task in numbers.tasks]
        evidence, limit = (
            "–" if share is None else f"{100 * share:.0f} %" for share in (row.mean.evidence_recall, row.mean.efficiency)
        )
        named = f"`{row.mean.method}`{mark(row.mean.method)}"
        yield f"| {named} | {' | '.join(cells)} | {evidence} | {row.mean.speedup:.2f} | {limit} |"


def _cell(cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = f"{100 * cell.score:.0f} ± {50 * (cell.high - cell.low):.0f}"
    return {1: f"**{text}**", -1: f"*{text}*"}.get(cell.against_random, text)


def _random_table(numbers: Numbers) -> Iterator[str]:
    """How often each method does better than random selection, the one that most often does first."""
    yield from ("| method | better | no different | worse | worse on |", "|---|--:|--:|--:|---|")
    found: dict[str, list[tuple[str, int]]] = {}
    for row in numbers.rows:
        if row.mean.method not in REFERENCE_POINTS:
            found.setdefault(row.mean.method, []).extend((task, cell.against_random) for task, cell in row.cells.items())
    for method, verdicts in sorted(found.items(), key=lambda each: -sum(sign for _, sign in each[1]) / len(each[1])):
        counts = Counter(sign for _, sign in verdicts)
        worse = Counter(task for task, sign in verdicts if sign < 0)
        listed = ", ".join(f"{task} ({times})" if times > 1 else task for task, times in worse.most_common())
        yield f"| `{method}`{mark(method)} | {counts[1]} | {counts[0]} | {counts[-1]} | {listed} |"
