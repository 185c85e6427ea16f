"""What workers on Ray load in the tests; in a file of its own, because a worker has to import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.bench.conftest import made_up

from foveate.bench.cells import Cell
from foveate.bench.records import Measurement
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe


@dataclass(frozen=True)
class Deadly:
    """Stands for a model."""

    marks: Path

    def __call__(self, cell: Cell, questions: Sequence[Any], advance: Callable[[int], None]) -> Measurement:
        return _measure(self.marks, cell, questions, advance)

    def refusals(self, recipes: Sequence[Recipe]) -> list[str | None]:
        return ["too bright" if str(recipe).startswith("scope") else None for recipe in recipes]


def deadly(marks: Path) -> Deadly:
    """Made-up numbers, but ``random`` kills its first worker, ``uniform`` all of them, and ``fastv`` raises.

    Who was at a cell leaves a file in ``marks``.
    """
    return Deadly(marks)


def _measure(marks: Path, cell: Cell, questions: Sequence[Any], advance: Callable[[int], None]) -> Measurement:
    first = not any(marks.glob(f"{cell.method}-*"))
    marks.joinpath(f"{cell.method}-{os.getpid()}").touch()
    if cell.method == "uniform" or (cell.method == "random" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.method == "fastv":
        raise FoveateError("fastv: has a bad day")
    return made_up(cell, questions, advance)


def nowhere() -> Deadly:
    """A model that is not there."""
    raise FoveateError("model='nowhere': cannot be loaded")
