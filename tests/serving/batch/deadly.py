"""What workers on Ray load in the tests; in a file of its own, because a worker has to import it."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from foveate.core.errors import FoveateError
from foveate.serving.answered import Answered
from foveate.serving.asked import Asked, survey
from foveate.serving.batch import Crewed, Work, answer_all
from foveate.serving.ledger import Ledger

SETTINGS = {"model": "deadly"}


@dataclass(frozen=True)
class Deadly:
    """Stands for a model: says the question again.

    ``kill once`` kills the first worker that is at it, ``kill always`` all of them, ``raise`` raises, ``gone`` is what
    nobody answers. Who was at a row leaves a file in ``marks``.
    """

    marks: Path
    seconds: float

    def __call__(self, rows: Sequence[Asked]) -> list[Answered]:
        return [self._answer(row) for row in rows]

    def _answer(self, row: Asked) -> Answered:
        asked = row.question.prompt
        first = not any(self.marks.glob(f"{row.id}-*"))
        self.marks.joinpath(f"{row.id}-{os.getpid()}").touch()
        if asked == "kill always" or (asked == "kill once" and first):
            os.kill(os.getpid(), signal.SIGKILL)
        if asked == "raise":
            raise FoveateError("raise: has a bad day")
        time.sleep(self.seconds)
        return Answered(row.id, asked, 4, 2, 0.0, gone=asked == "gone")


def nothing() -> Deadly:
    """A model that is not there."""
    raise FoveateError("model='nowhere': cannot be loaded")


def work(data: Path, marks: Path, seconds: float = 0.0) -> Work:
    """All rows of a file."""
    return Work(data, survey(data, 64).rows, 64, partial(Deadly, marks, seconds))


class Silent:
    """Watches nothing."""

    def began(self, workers: int, done: int, rows: int) -> None:
        """Nothing."""

    def answered(self, answered: Answered) -> None:
        """Nothing."""


if __name__ == "__main__":
    data, out, marks, address = sys.argv[1:]
    with Ledger(Path(out), SETTINGS) as ledger:
        answer_all(work(Path(data), Path(marks), 0.1), Crewed(address, "cpu", 1, 4), ledger, Silent())
