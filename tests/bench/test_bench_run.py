"""The loop over cells: what is done is skipped, what fails is reported and takes nothing else down."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.bench.conftest import ask

from foveate.bench.cells import plan
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.run import run

CELLS = plan(["shape"], ["hiprune"], [0.5])


def test_every_cell_is_measured_on_the_same_questions_and_kept(folder: ResultFolder, measure: Any, log: Any) -> None:
    asked = []

    def remember(cell, questions, advance):
        asked.append([question.prompt for question in questions])
        return measure(cell, questions, advance)

    run(CELLS, ask, remember, folder, log)

    assert [(each.method, each.score) for each in folder.records] == [
        ("none", 0.9),
        ("random", 0.5),
        ("uniform", 0.5),
        ("downsample", 0.5),
        ("pool", 0.5),
        ("hiprune", 0.8),
    ]
    assert all(prompts == asked[0] and len(prompts) == 20 for prompts in asked)
    assert log.questions == 120


def test_the_interval_encloses_the_score(folder: ResultFolder, measure: Any, log: Any) -> None:
    run(CELLS, ask, measure, folder, log)

    assert all(0 <= each.score_low < each.score < each.score_high <= 1 for each in folder.records)


def test_evidence_recall_is_averaged_over_the_questions_that_have_evidence(
    folder: ResultFolder, measure: Any, log: Any
) -> None:
    run(plan(["existence"], [], [0.5]), ask, measure, folder, log)

    recalls = next(json.loads(path.read_text())["answers"] for path in folder.path.glob("cells/*.random.*.json"))
    assert any(answer["evidence_recall"] is None for answer in recalls)
    assert folder.record(("existence", "random", "0.5")).evidence_recall == 0.5


def test_finished_cells_are_not_measured_again(folder: ResultFolder, settings: Settings, measure: Any, log: Any) -> None:
    run(CELLS[:2], ask, measure, folder, log)

    run(CELLS, ask, measure, ResultFolder(folder.path, settings, resume=True), log)

    assert [cell.method for cell in log.started_cells] == ["none", "random", "uniform", "downsample", "pool", "hiprune"]


def test_a_failing_cell_is_reported_and_the_others_go_on(folder: ResultFolder, measure: Any, log: Any) -> None:
    def fail_once(cell, questions, advance):
        if cell.method == "random":
            raise RuntimeError("out of\nmemory")
        return measure(cell, questions, advance)

    run(CELLS, ask, fail_once, folder, log)

    assert [each.method for each in folder.records] == ["none", "uniform", "downsample", "pool", "hiprune"]
    (entry,) = json.loads((folder.path / "failures.json").read_text())
    assert (entry["task"], entry["method"], entry["keep"]) == ("shape", "random", 0.5)
    assert entry["error"] == log.failures[0].error == "RuntimeError: out of memory"
    assert "fail_once" in entry["traceback"]


def test_a_failed_cell_gets_another_chance_on_resume(
    folder: ResultFolder, settings: Settings, measure: Any, log: Any
) -> None:
    def fail(cell, questions, advance):
        raise RuntimeError

    run(CELLS[:1], ask, fail, folder, log)
    resumed = ResultFolder(folder.path, settings, resume=True)
    run(CELLS[:1], ask, measure, resumed, log)

    assert [each.method for each in resumed.records] == ["none"]
    assert not (folder.path / "failures.json").exists()


def test_an_interrupted_run_keeps_what_was_finished(
    folder: ResultFolder, settings: Settings, measure: Any, log: Any
) -> None:
    def interrupt(cell, questions, advance):
        if cell.method == "uniform":
            raise KeyboardInterrupt
        return measure(cell, questions, advance)

    with pytest.raises(KeyboardInterrupt):
        run(CELLS, ask, interrupt, folder, log)

    resumed = ResultFolder(folder.path, settings, resume=True)
    assert [each.method for each in resumed.records] == ["none", "random"]
