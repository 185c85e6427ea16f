"""What workers on Ray load in the tests; in a file of its own, because a worker has to import it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tests.bench.conftest import made_up

from foveate.bench.cells import Cell
from foveate.bench.records import Measurement
from foveate.bench.run import Measure
from foveate.core.errors import FoveateError


def deadly(marks: Path) -> Measure:
    """Made-up numbers, but ``random`` kills its first worker, ``uniform`` all of them, and ``fastv`` raises.

    Who was at a cell leaves a file in ``marks``.
    """
    return partial(_measure, marks)


def _measure(marks: Path, cell: Cell, questions: Sequence[Any], advance: Callable[[int], None]) -> Measurement:
    first = not any(marks.glob(f"{cell.method}-*"))
    marks.joinpath(f"{cell.method}-{os.getpid()}").touch()
    if cell.method == "uniform" or (cell.method == "random" and first):
        os.kill(os.getpid(), signal.SIGKILL)
    if cell.method == "fastv":
        raise FoveateError("fastv: has a bad day")
    return made_up(cell, questions, advance)


def nowhere() -> Measure:
    """A model that is not there."""
    raise FoveateError("model='nowhere': cannot be loaded")
