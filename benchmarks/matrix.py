"""Writes which method runs on which model family into ``docs/matrix.md``: ``python benchmarks/matrix.py``."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from foveate.engine.hosting import Verdict, by_family
from foveate.report.hosting_table import WORKS, marks, reasons
from foveate.report.training_mark import footnote, mark


def main() -> None:
    (Path(__file__).parent.parent / "docs" / "matrix.md").write_text(page(by_family()))


def page(verdicts: Sequence[Verdict]) -> str:
    """Markdown: the table, then what its numbers stand for."""
    families = list(dict.fromkeys(verdict.model for verdict in verdicts))
    lines = [
        "# What runs where",
        "",
        f"Every method with its default parameters on every model family ({WORKS} = runs; a number = refused, for the",
        "reason of that number below), as `foveate.attach` decides on a small model of the family: 8 decoder layers, sdpa",
        "attention, no artifacts, no companion, kvpress installed. Other parameters may run where the defaults do not.",
        "`foveate methods --matrix --model MODEL` says it of a model of yours.",
        "",
        f"Written by `python benchmarks/matrix.py` with transformers {version('transformers')}.",
        "",
        f"| method | {' | '.join(families)} |",
        "|---|" + ":-:|" * len(families),
    ]
    shown = marks(verdicts)
    lines += [f"| `{method}`{mark(method)} | {' | '.join(cells)} |" for method, cells in shown.items()]
    lines += ["", footnote(shown), ""]
    for number, (reason, methods) in enumerate(reasons(verdicts).items(), start=1):
        lines.append(f"{number}. {', '.join(f'`{method}`' for method in methods)}: {reason}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
