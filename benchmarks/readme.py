"""Writes the table of a finished bench into the README: ``python benchmarks/readme.py runs/demo/results.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from foveate import reference
from foveate.bench.cells import keep_text

BEGIN, END = "<!-- demo:begin -->", "<!-- demo:end -->"


def main() -> None:
    records = json.loads(Path(sys.argv[1]).read_text())
    readme = Path(__file__).parent.parent / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    readme.write_text(before + BEGIN + "\n" + table(records) + END + rest.split(END)[1])


def table(records: list[dict[str, Any]]) -> str:
    """Markdown for the README."""
    lines = [
        f"Scores in percent, n = {records[0]['n']} questions a task, ± half the 95 % interval. `keep` is the share of",
        "visual tokens kept (of cached entries for `snapkv`; `shortv` freezes layers and drops nothing). *Evidence* is",
        "the share of the patches holding the answer that reach the last layer, *speed-up* that of the language model's",
        "prefill; both are means over tasks. On a model this small the speed-up says little about larger ones.",
        "",
    ]
    return "\n".join([*lines, *rows(records)]) + "\n"


def rows(records: list[dict[str, Any]]) -> list[str]:
    """Score in percent by task, half the width of its 95 % interval, evidence recall and prefill speed-up."""
    tasks = list(dict.fromkeys(record["task"] for record in records))
    plain = {record["task"]: record["prefill_seconds"] for record in records if record["method"] == "none"}
    below = _below_floor()
    heads = [f"{task} (below floor)" if task in below else task for task in tasks]
    lines = [
        f"| method | keep | {' | '.join(heads)} | evidence | speed-up |",
        "|" + "---|" * (len(tasks) + 4),
        "| always the same answer | | " + " | ".join(f"{100 * _majority(task):.0f}" for task in tasks) + " | | |",
    ]
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for record in records:
        cells.setdefault((keep_text(record["keep"]), record["method"]), {})[record["task"]] = record
    for (keep, method), by_task in cells.items():
        scores = [
            f"{100 * by_task[task]['score']:.0f} ± {50 * (by_task[task]['score_high'] - by_task[task]['score_low']):.0f}"
            if task in by_task
            else "-"
            for task in tasks
        ]
        recall = [r["evidence_recall"] for r in by_task.values() if r["evidence_recall"] is not None]
        speed = [plain[task] / r["prefill_seconds"] for task, r in by_task.items()]
        lines.append(
            f"| `{method}` | {keep} | {' | '.join(scores)} "
            f"| {100 * sum(recall) / len(recall):.0f} % | {sum(speed) / len(speed):.2f} |"
        )
    return lines


def _majority(task: str) -> float:
    return float(reference.evaluation(reference.path())[task]["majority"])


def _below_floor() -> set[str]:
    return {task for task, result in reference.evaluation(reference.path()).items() if result["below_floor"]}


if __name__ == "__main__":
    main()
