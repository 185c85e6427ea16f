"""``foveate report``, and the page that a bench leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def benched(call: Any, tiny: Path, tmp_path: Path) -> Path:
    out = tmp_path / "out"
    options = ["--tasks", "shape", "--n", 4, "--batch-size", 2, "--keep", 0.25, "--methods", "fastv", "--out", out]
    result = call("bench", "--model", tiny, *options)
    assert result.exit_code == 0, result.output
    assert str(out / "report.html") in result.stdout.replace("\n", "")
    return out


def test_a_bench_leaves_a_page_and_report_makes_the_same(benched: Path, call: Any, tmp_path: Path) -> None:
    result = call("report", benched, "--out", tmp_path / "mine.html")

    assert result.exit_code == 0, result.output
    assert (tmp_path / "mine.html").read_text() == (benched / "report.html").read_text()
    assert len(list((benched / "examples").iterdir())) == 3


def test_a_folder_without_results_is_refused_in_one_line(call: Any, tmp_path: Path) -> None:
    result = call("report", tmp_path)

    assert result.exit_code == 2
    assert result.stderr.startswith("foveate: folder=")
    assert result.stderr.count("\n") == 1


def test_a_page_that_cannot_be_written_is_one_line(benched: Path, call: Any, tmp_path: Path) -> None:
    result = call("report", benched, "--out", tmp_path / "nowhere" / "mine.html")

    assert result.exit_code == 2
    assert "cannot be written" in result.stderr
