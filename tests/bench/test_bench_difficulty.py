"""VTC-Bench's split: simple and difficult questions, by what a smaller picture still answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from foveate.bench.cells import plan
from foveate.bench.difficulty import Difficulty, Group, difficulties
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.run import run
from foveate.bench.statistics import interval
from foveate.report.bench_table import bench_tables
from foveate.report.page import page
from foveate.tasks import questions

N = 80

Make = Callable[..., ResultFolder]


@pytest.fixture
def folder(tmp_path: Path, measure: Any, log: Any) -> Make:
    """A bench of ``N`` questions in which each method answers those with the given numbers."""

    def make(right: Mapping[str, range], leave_out: str = "") -> ResultFolder:
        def answered(cell: Any, asked: Any, advance: Any) -> Any:
            measured = measure(cell, asked, advance)
            known = right.get(cell.method, range(0))
            answers = [replace(each, score=float(i in known)) for i, each in enumerate(measured.answers)]
            return replace(measured, answers=answers)

        settings = Settings(model="reference", n=N, seed=0, device="cpu", dtype="float32", batch_size=4)
        made = ResultFolder(tmp_path, settings)
        cells = [cell for cell in plan(["shape"], ["hiprune"], [0.5]) if cell.method != leave_out]
        run(cells, lambda task: questions(task, N, 0), answered, made, log)
        assert not made.failures
        return made

    return make


RIGHT = {"none": range(70), "downsample": range(30), "pool": range(10), "hiprune": range(20, 50), "random": range(80)}


def test_questions_are_split_by_what_the_smaller_picture_answers(folder: Make) -> None:
    done = folder(RIGHT)

    found = {each.method: each for each in difficulties(done, done.records)}

    # 30 simple, of which it answers 10; 40 more are answered in full alone, of which it answers 20; 10 by none.
    assert found["hiprune"] == Difficulty(
        "hiprune",
        0.5,
        "downsample",
        Group(30, 1 / 3, *interval([1.0] * 10 + [0.0] * 20)),
        Group(40, 1 / 2, *interval([1.0] * 20 + [0.0] * 20)),
    )
    assert found["random"].difficult == Group(40, 1.0, *interval([1.0] * 40))
    assert set(found) == {"random", "uniform", "hiprune"}


def test_pooling_stands_in_where_a_grid_is_fixed_and_small_groups_are_not_reported(folder: Make) -> None:
    done = folder(RIGHT, leave_out="downsample")

    found = {each.method: each for each in difficulties(done, done.records)}

    assert found["hiprune"].by == "pool"
    assert found["hiprune"].simple is None  # ten questions
    assert found["hiprune"].difficult == Group(60, 1 / 2, *interval([1.0] * 30 + [0.0] * 30))


def test_table_and_page_have_both_groups(folder: Make) -> None:
    done = folder(RIGHT, leave_out="downsample")
    console = Console(width=120, record=True, file=StringIO())

    console.print(bench_tables(done.records, [], {}, [], {}, "made up", difficulties(done, done.records)))

    text = console.export_text()
    assert "difficult is what the unmodified model answers and pool at that budget does not" in text
    row = next(line for line in text.splitlines() if line.strip().startswith("hiprune"))
    assert row.split()[1:] == ["0.5", "–", "–", "<", "30", "50.0", "[37.7,", "62.3]", "60"]
    html = page(done)
    assert 'id="difficulty"' in html
    assert "<td>50.0</td><td>[37.7, 62.3]</td><td>60</td>" in html


def test_without_a_smaller_picture_nothing_is_split(folder: Make) -> None:
    done = folder(RIGHT)
    records = [record for record in done.records if record.method not in ("downsample", "pool")]

    assert difficulties(done, records) == []
