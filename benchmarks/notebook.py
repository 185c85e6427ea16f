"""Runs docs/notebook.ipynb and keeps what its cells show: ``python -m benchmarks.notebook``."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

NOTEBOOK = Path(__file__).parents[1] / "docs" / "notebook.ipynb"
SECONDS = 120
"""The longest that one cell may take."""


def executed(notebook: NotebookNode) -> NotebookNode:
    """The notebook with what its cells show now: text as a reader would see it, each picture once, as JPEG."""
    NotebookClient(notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # What libraries say on stderr (progress bars, warnings) is of the machine, not of the page.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
            for output in cell.outputs:
                shown = output.get("data", {})
                if "image/jpeg" in shown:  # Pillow shows a picture in both formats
                    shown.pop("image/png")
    return notebook


def main() -> None:
    nbformat.write(executed(nbformat.read(NOTEBOOK, as_version=4)), NOTEBOOK)


if __name__ == "__main__":
    main()
