"""The page that compares methods on reference-smol with the small models, from made-up numbers."""

from __future__ import annotations

from benchmarks.results_page import Cell, Numbers, Row, Task
from benchmarks.verdict import common_tasks, lines, of_model

from foveate.bench.summary import Mean

TASKS = {"shape": Task(0.1, False), "existence": Task(0.5, False), "counting": Task(0.3, True)}


def row(method: str, keep: float | None, score: float, sign: int) -> Row:
    cells = {task: Cell(score, score, score, sign) for task in TASKS}
    return Row(Mean(method, keep, 3, score, score, None, None, 1.0, None, None, score, score), cells)


def numbers(model: str, series: str, *rows: Row) -> Numbers:
    return Numbers(model, series, "", 200, "cpu", "float32", TASKS, {}, [row("none", None, 0.8, 0), *rows])


MEASURED = [
    numbers(
        "reference-smol", "verdict", row("fastv", 0.22, 0.6, 1), row("v2drop(x)", None, 0.2, -1), row("btp", 0.22, 0.4, 1)
    ),
    numbers("reference-tiles", "", row("fastv", 0.22, 0.4, -1), row("v2drop(x)", None, 0.2, -1), row("btp", 0.22, 0.3, 1)),
    numbers("reference-qwen", "", row("fastv", 0.22, 0.4, 0), row("v2drop(x)", None, 0.2, 1)),
    numbers("reference-qwen", "later", row("btp", 0.22, 0.8, 1)),
]


def test_tasks_that_a_model_did_not_learn_are_left_out() -> None:
    assert common_tasks(MEASURED, "reference-smol", "reference-qwen") == ["shape", "existence"]


def test_what_is_retained_is_over_the_unmodified_model() -> None:
    found = of_model([each for each in MEASURED if each.model == "reference-qwen"], ["shape", "existence"])

    assert found["fastv", "0.22"].retained == 0.5
    assert found["btp", "0.22"].retained == 1.0
    assert found["btp", "0.22"].better == 2
    assert found["v2drop(x)", ""].verdict == "better"


def test_models_that_disagree_are_named() -> None:
    page = "\n".join(lines(MEASURED))

    assert "| `fastv` | 0.22 | 75 % (2 better, 0 worse) | 50 % (0 better, 2 worse) | 50 % (0 better, 0 worse) |" in page
    assert "- Better than `random` on all: `btp` at 0.22." in page
    assert "- Better on `reference-smol`, on no small model: `fastv` at 0.22." in page
    assert "- Better on a small model, not on `reference-smol`: `v2drop(x)`." in page
    assert "| `reference-smol`, `reference-tiles` | 3 | 1.00 | 2 |" in page
