"""The page of ``benchmarks.smol``, from what it measured."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from foveate.bench.statistics import bootstrap, difference, interval

FULL, RANDOM = "full cache", "random"
FLOOR = 0.5
LEAST = 4
"""Questions from which on a cell is shown."""
ENOUGH = 24
"""From which on not to differ beyond noise from the full cache says something."""
SAME = {
    "snapkv": "kvpress SnapKVPress",
    "streamingllm": "kvpress StreamingLLMPress",
    "press(KeyDiffPress)": "kvpress KeyDiffPress",
}
"""Systems that are here and in kvpress; random entries are drawn otherwise."""


@dataclass(frozen=True)
class Measured:
    """What ``benchmarks.smol`` wrote."""

    about: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, tuple[float, str]]]
    kv_bytes: Mapping[str, int]
    losses: Mapping[str, float]
    steps: Mapping[str, Sequence[float]]

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(cell.split("|")[0] for cell in self.answers))

    @property
    def systems(self) -> list[str]:
        """Those with a budget, in their order."""
        return list(dict.fromkeys(name for cell in self.answers for _, keep, name in [cell.split("|")] if keep))

    @property
    def fixed(self) -> list[str]:
        """Those without, the full cache first."""
        return list(dict.fromkeys(name for cell in self.answers for _, keep, name in [cell.split("|")] if not keep))

    def cell(self, task: str, keep: float, system: str) -> Mapping[str, tuple[float, str]]:
        """Answers by the question's number."""
        written = "" if system in self.fixed else str(keep)
        return self.answers.get(f"{task}|{written}|{system}", {})

    def common(self, task: str, keep: float) -> list[str]:
        """Numbers of the questions that every system that was asked any has answered."""
        asked = [set(cell) for name in (*self.fixed, *self.systems) if (cell := self.cell(task, keep, name))]
        return sorted(set.intersection(*asked), key=int) if asked else []

    def scores(self, task: str, keep: float, system: str) -> list[float]:
        """On the common questions; empty where the system was not asked."""
        cell = self.cell(task, keep, system)
        return [cell[number][0] for number in self.common(task, keep)] if cell else []

    def budgets(self) -> Iterator[tuple[float, list[str]]]:
        """Each budget with the tasks that have enough answers there."""
        for keep in self.about["keeps"]:
            tasks = [
                task for task in self.tasks if len(self.common(task, keep)) >= LEAST and self.scores(task, keep, RANDOM)
            ]
            if tasks:
                yield keep, tasks


def write_page(source: Path) -> None:
    """The page beside ``source``."""
    found = json.loads(source.read_text())
    source.with_suffix(".md").write_text(page(Measured(**found)))


def page(measured: Measured) -> str:
    """Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in measured.about["versions"].items())
    lengths = ", ".join(f"{task} {count}" for task, count in measured.about["tokens"].items())
    parts = [
        "# A real language model",
        "",
        "Written by `python -m benchmarks.smol`. How to read it: [text models](../text.md#tasks-and-which-method).",
        "",
        f"SmolLM2-135M-Instruct in float32 on one thread of a CPU; {versions}. Tokens of a prompt: {lengths}. The question "
        "is part of the prompt when that is compressed, in conversations the first one is. Intervals of scores are 95 % "
        "ones. All rows of a table are about the same questions.",
        "",
        *_floor(measured),
    ]
    for keep, tasks in measured.budgets():
        parts += [
            "",
            f"## {keep:.0%} of the cache",
            "",
            *_table(measured, keep, tasks),
            "",
            *_verdict(measured, keep, tasks),
        ]
    parts += ["", "## One algorithm, two implementations", "", *_agreement(measured)]
    parts += ["", "## Steps of decoding", "", *_steps(measured)]
    return "\n".join(parts) + "\n"


def _floor(measured: Measured) -> list[str]:
    """How well the full cache does, and who is below the floor."""
    told = []
    for task in measured.tasks:
        scores = [score for score, _ in measured.cell(task, 1.0, FULL).values()]
        low, high = interval(scores)
        below = fmean(scores) < FLOOR
        told.append(
            f"- `{task}`: {_percent(fmean(scores))} ({_percent(low)} to {_percent(high)}) of {len(scores)} "
            f"with the full cache{', below the floor of 50 %: it says little of a system' if below else ''}"
        )
    return told


def _table(measured: Measured, keep: float, tasks: Sequence[str]) -> list[str]:
    asked = ", ".join(f"{task} {len(measured.common(task, keep))}" for task in tasks)
    head = ["system", *tasks, "perplexity", "KV bytes"]
    lines = [f"Questions: {asked}.", "", f"| {' | '.join(head)} |", "|---|" + "---:|" * (len(head) - 1)]
    whole = _bytes(measured, keep, FULL)
    for system in (*measured.fixed, *measured.systems):
        cells = [_score(measured.scores(task, keep, system)) for task in tasks]
        taken = _bytes(measured, keep, system)
        share = f"{taken / whole:.0%}" if taken and whole else ""
        lines.append(f"| {system} | {' | '.join(cells)} | {_perplexity(measured, keep, system)} | {share} |")
    lines += ["", f"Perplexity: of what follows compressed text, {_documents(measured)}. KV bytes: of the full cache's."]
    return lines


def _documents(measured: Measured) -> str:
    names = list(dict.fromkeys(cell.split("|")[0] for cell in measured.losses))
    return f"over {len(names)} documents ({', '.join(names)})"


def _perplexity(measured: Measured, keep: float, system: str) -> str:
    written = "" if system in measured.fixed else str(keep)
    names = dict.fromkeys(cell.split("|")[0] for cell in measured.losses)
    found = [measured.losses.get(f"{name}|{written}|{system}") for name in names]
    known = [loss for loss in found if loss is not None]
    return f"{math.exp(fmean(known)):.1f}" if known and len(known) == len(found) else ""


def _bytes(measured: Measured, keep: float, system: str) -> int | None:
    return measured.kv_bytes.get(f"{'' if system in measured.fixed else keep}|{system}")


def _score(scores: Sequence[float]) -> str:
    if not scores:
        return ""
    low, high = interval(scores)
    return f"{_percent(fmean(scores))} ({_percent(low)} to {_percent(high)})"


def _verdict(measured: Measured, keep: float, tasks: Sequence[str]) -> list[str]:
    """Paired comparisons with random entries and with the full cache."""
    lines = []
    for task in tasks:
        plain, random = measured.scores(task, keep, FULL), measured.scores(task, keep, RANDOM)
        better, worse, lossless = [], [], []
        for system in measured.systems:
            scores = measured.scores(task, keep, system)
            if system == RANDOM or not scores:
                continue
            beside = difference(scores, random)
            if beside.low > 0:
                better.append(system)
            elif beside.high < 0:
                worse.append(system)
            if fmean(scores) >= fmean(plain) or not difference(plain, scores).beyond_noise:
                lossless.append(system)
        told = f"not to be told from the full cache: {_list(lossless)}"
        few = f"too few questions ({len(plain)}) to say who does as well as the full cache"
        lines.append(
            f"- `{task}`: better than random entries beyond noise: {_list(better)}; worse: {_list(worse)}; "
            f"{told if len(plain) >= ENOUGH else few}."
        )
    means = {
        system: fmean(fmean(scores) for scores in found)
        for system in measured.systems
        if all(found := [measured.scores(task, keep, system) for task in tasks])
    }
    ranked = sorted(means, key=lambda system: -means[system])
    if ranked:
        shown = ", ".join(f"{system} {_percent(means[system])}" for system in ranked)
        lines.append(f"- Mean over the tasks, best first: {shown}; full cache "
                     f"{_percent(fmean(fmean(measured.scores(task, keep, FULL)) for task in tasks))}.")  # fmt: skip
    return lines


def _agreement(measured: Measured) -> list[str]:
    """How often this package's implementation says the same as kvpress' own, and by how much scores differ."""
    lines = [
        "Of this package and by kvpress' own hooks. `streamingllm` goes on evicting while it decodes, as published; "
        "kvpress' press does not.",
        "",
        "| system | budget | same words | score here minus there |",
        "|---|---:|---:|---:|",
    ]
    for here, there in SAME.items():
        for keep in measured.about["keeps"]:
            pairs = [
                (one[number], other[number])
                for task in measured.tasks
                for one, other in [(measured.cell(task, keep, here), measured.cell(task, keep, there))]
                for number in one.keys() & other.keys()
            ]
            if not pairs:
                continue
            same = sum(one[1] == other[1] for one, other in pairs)
            apart = [one[0] - other[0] for one, other in pairs]
            low, high = bootstrap(apart, ends=(-1, 1))
            lines.append(
                f"| {here} | {keep:.0%} | {same} of {len(pairs)} | "
                f"{_points(fmean(apart))} ({_points(low)} to {_points(high)}) |"
            )
    return lines


def _steps(measured: Measured) -> list[str]:
    """Tokens a second of computing."""
    whole = next((steps for cell, steps in measured.steps.items() if cell.split("|")[1] == FULL), None)
    if whole is None:
        return ["Not measured yet."]
    lines = [
        f"Behind {measured.about['long']} tokens of documents, median of {len(whole)} steps. Seconds are those that the "
        "thread computes, so that other work on the machine counts little.",
        "",
        "| system | budget | tokens a second | beside the full cache |",
        "|---|---:|---:|---:|",
    ]
    for cell, steps in measured.steps.items():
        keep, system = cell.split("|")
        budget = f"{float(keep):.0%}" if keep else ""
        lines.append(f"| {system} | {budget} | {1 / median(steps):.1f} | {median(whole) / median(steps):.2f} x |")
    return lines


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _points(share: float) -> str:
    return f"{100 * share:+.0f}"
