"""What becomes of a row of `foveate batch`, whoever answers it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from foveate.core.errors import FoveateError
from foveate.core.text import one_line
from foveate.serving.asked import ID, Asked


@dataclass(frozen=True)
class Answered:
    """What became of a row.

    Attributes:
        answer: one text, or one for each turn of a conversation; None if it failed.
        before, after: visual tokens of its pictures, and how many of them entered the last layer (on a server: were kept);
            None where nobody says.
        seconds: from opening the pictures to the answer, of all rows that were answered with it.
        error: what it failed of, in a line.
        gone: whether it failed because a server is not there any more.
    """

    id: ID
    answer: str | list[str] | None = None
    before: int | None = None
    after: int | None = None
    seconds: float | None = None
    error: str | None = None
    gone: bool = False

    @classmethod
    def failed(cls, row: Asked, error: BaseException, *, gone: bool = False) -> Answered:
        """The row died of an error; what a user got wrong says so itself, of others the kind is half of the message."""
        named = one_line(error) if isinstance(error, FoveateError) else f"{type(error).__name__}: {one_line(error)}"
        return cls(row.id, error=named, gone=gone)

    def to_json(self) -> dict[str, Any]:
        """The line of the file."""
        if self.error is not None:
            return {"id": self.id, "error": self.error}
        seconds = None if self.seconds is None else round(self.seconds, 6)
        costs = {"tokens_before": self.before, "tokens_after": self.after, "seconds": seconds}
        return {"id": self.id, "answer": self.answer, **costs}


class Answerer(Protocol):
    """What a worker has loaded."""

    def __call__(self, rows: Sequence[Asked]) -> list[Answered]:
        """What becomes of each of the rows, in their order; no row harms another, unless it ends the process."""
