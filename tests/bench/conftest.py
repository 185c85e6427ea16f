"""A bench without a model: cells are measured by a function that makes its numbers up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

from foveate.bench.cells import Cell
from foveate.bench.examples import illustrate
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.records import Answer, Failure, Measurement, Record
from foveate.bench.run import Measure
from foveate.tasks import Question, questions


def ask(task: str) -> list[Question]:
    """Twenty questions of a task."""
    return questions(task, 20, seed=0)


QUALITY = {
    "none": 0.9,
    "random": 0.5,
    "random_kv": 0.5,
    "uniform": 0.5,
    "downsample": 0.5,
    "pool": 0.5,
    "hiprune": 0.8,
    "fastv": 0.5,
}
"""Share of the questions that the made-up methods answer."""


class Log:
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.started_cells: list[Cell] = []
        self.records: list[Record] = []
        self.failures: list[Failure] = []
        self.questions = 0

    def started(self, cell: Cell) -> None:
        self.started_cells.append(cell)

    def advanced(self, questions: int) -> None:
        self.questions += questions

    def finished(self, record: Record) -> None:
        self.records.append(record)

    def failed(self, failure: Failure) -> None:
        self.failures.append(failure)


def made_up(cell: Cell, questions: Sequence, advance: Callable[[int], None]) -> Measurement:
    """The first so many questions are right; fewer tokens are faster."""
    right = round(QUALITY[cell.method] * len(questions))
    advance(len(questions))
    keep = 1.0 if cell.keep is None else float(cell.keep)
    return Measurement(
        answers=[
            Answer(
                q.prompt, q.answer, q.answer if i < right else "", float(i < right), keep if q.evidence[0].any() else None
            )
            for i, q in enumerate(questions)
        ],
        visual_tokens=144 * keep,
        prefill_seconds=0.1 * keep,
        decode_seconds=None if cell.method == "random" else 0.01,
        first_token_seconds=0.1 + 0.1 * keep,
        total_seconds=0.2 + 0.1 * keep,
        peak_bytes=None,
        kv_bytes=1e6 * keep,
        batch=4,
        pairs={
            "speedup": [0.9 / keep, 1 / keep, 1.2 / keep],
            "first_token_speedup": [0.2 / (0.1 + 0.1 * keep)],
            "total_speedup": [0.3 / (0.2 + 0.1 * keep)],
            "efficiency": [0.95],
        },
        visual_by_layer=[144.0, 144 * keep],
        kv_by_layer=[5e5 * keep, 5e5 * keep],
        evidence_by_layer=[1.0, keep],
        examples=[illustrate(q, [(12, 12)], [[torch.arange(144)], [torch.arange(int(144 * keep))]]) for q in questions[:2]],
    )


@pytest.fixture
def measure() -> Measure:
    return made_up


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
def settings() -> Settings:
    return Settings(model="reference", n=20, seed=0, device="cpu", dtype="float32", batch_size=4)


@pytest.fixture
def folder(tmp_path: Path, settings: Settings) -> ResultFolder:
    return ResultFolder(tmp_path / "out", settings)
