"""``foveate bench compare``: two results of the bench side by side."""

from __future__ import annotations

from foveate.bench.compare import Side
from foveate.bench.compare import compare as pair_up
from foveate.cli.console import output
from foveate.report.compare_table import compare_table


def compare(a: str, b: str) -> None:
    """Print where B answers better or worse than A."""
    output().print(compare_table(pair_up(Side.parse(a), Side.parse(b))))
