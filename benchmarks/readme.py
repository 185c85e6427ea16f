"""Writes the table of a finished bench into the README: ``python benchmarks/readme.py runs/demo/results.json``."""

from __future__ import annotations

import sys
from pathlib import Path

from foveate import reference
from foveate.bench.cells import keep_text
from foveate.bench.folder import Results
from foveate.bench.summary import means
from foveate.report.numbers import between

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def main() -> None:
    results = Results.open(Path(sys.argv[1]).parent)
    readme = Path(__file__).parent.parent / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + "\n" + table(results) + END + rest.split(END)[1])


def table(results: Results) -> str:
    """Markdown for the README."""
    settings, machine = results.settings, results.document("settings.json")["machine"]
    lines = [
        f"Scores in percent, n = {settings.n} questions a task, ± half the 95 % interval. `keep` is the share of visual",
        "tokens kept (of cached entries for `snapkv`; `shortv` freezes layers and drops nothing). *Evidence* is the share",
        "of the patches holding the answer that reach the last layer. Speed-ups, with their 95 % intervals, are those of",
        "the picture below: medians of pairs, a batch under the method and unmodified one after the other; geometric mean",
        "over tasks. *First token* has encoder and the methods' own arithmetic in it, *prefill* is the language model's.",
        f"Measured on {machine['processor']}, {machine['threads']} thread{'s' * (machine['threads'] > 1)},",
        f"{settings.dtype}, batches of {settings.batch_size}; on a model this small they say little about larger ones.",
        "",
    ]
    return "\n".join([*lines, *rows(results)]) + "\n"


def rows(results: Results) -> list[str]:
    """Score in percent by task with half the width of its 95 % interval, evidence recall and speed-ups."""
    tasks = list(dict.fromkeys(record.task for record in results.records))
    below = _below_floor()
    heads = [f"{task} (below floor)" if task in below else task for task in tasks]
    lines = [
        f"| method | keep | {' | '.join(heads)} | evidence | first token | prefill |",
        "|" + "---|" * (len(tasks) + 5),
        "| always the same answer | | " + " | ".join(f"{100 * _majority(task):.0f}" for task in tasks) + " | | | |",
    ]
    for mean in means(results.records, results.pairs):
        records = [results.record((task, *mean.key[1:])) for task in tasks]
        scores = [
            "-" if each is None else f"{100 * each.score:.0f} ± {50 * (each.score_high - each.score_low):.0f}"
            for each in records
        ]
        evidence = "-" if mean.evidence_recall is None else f"{100 * mean.evidence_recall:.0f} %"
        first = between(mean.first_token_speedup, mean.first_token_speedup_low, mean.first_token_speedup_high)
        prefill = between(mean.speedup, mean.speedup_low, mean.speedup_high)
        named = f"`{mean.method}` | {keep_text(mean.keep)}"
        lines.append(f"| {named} | {' | '.join(scores)} | {evidence} | {first} | {prefill} |")
    return lines


def _majority(task: str) -> float:
    return float(reference.evaluation(reference.path())[task]["majority"])


def _below_floor() -> set[str]:
    return {task for task, result in reference.evaluation(reference.path()).items() if result["below_floor"]}


if __name__ == "__main__":
    main()
