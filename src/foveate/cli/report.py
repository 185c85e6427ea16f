"""``foveate report``: the HTML page of a bench that is there."""

from __future__ import annotations

from pathlib import Path

from rich.text import Text

from foveate.bench.folder import Results
from foveate.cli.console import output
from foveate.core.files import check_writable
from foveate.report.page import write_page


def report(folder: Path, out: Path | None) -> None:
    """Write the page and say where it is."""
    path = out or folder / "report.html"
    results = Results.open(folder)
    check_writable(path)
    write_page(results, path)
    output().print(Text(str(path)))
