"""Answers to rows: on a model in this process, one batch at a time, whatever becomes of single rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from foveate.checkpoint import Checkpoint, load, parse_model_args, resolve_device
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


@dataclass(frozen=True)
class OnModel:
    """How a model is loaded, and what it runs; `load` makes what answers."""

    model: str
    recipe: str
    seed: int
    device: str
    dtype: str
    companion: str | None = None
    artifacts: str | None = None
    model_args: str | None = None
    system: str | None = None

    def load(self) -> Answerer:
        """The model with the recipe attached.

        Raises:
            FoveateError: if it cannot be loaded, or refuses the recipe.
        """
        arguments = parse_model_args(self.model_args)
        beside = (self.companion, self.artifacts, arguments, self.system)
        loaded = load(self.model, resolve_device(self.device), self.dtype, *beside)
        return ModelAnswers(loaded, self.recipe, self.seed)


class ModelAnswers:
    """A model with a recipe attached."""

    def __init__(self, checkpoint: Checkpoint, recipe: str, seed: int) -> None:
        self._checkpoint = checkpoint
        self._session = checkpoint.attach(recipe, seed)

    def __call__(self, rows: Sequence[Asked]) -> list[Answered]:
        """As `Answerer`: rows that are asked alike at once, conversations one by one."""
        alike: dict[object, list[Asked]] = {}
        for row in rows:
            alike.setdefault(row.key if _is_conversation(row) else row.question.max_new_tokens, []).append(row)
        found = {each.id: each for group in alike.values() for each in self._isolated(group)}
        return [found[row.id] for row in rows]

    def _isolated(self, rows: Sequence[Asked]) -> list[Answered]:
        """Answer them at once; if that fails, each alone."""
        try:
            return self._converse(rows[0]) if _is_conversation(rows[0]) else self._answer(rows)
        # A row may die of anything: its picture, memory, a bug in a third-party method; the others are not to blame.
        except Exception as error:
            if len(rows) == 1:
                return [Answered.failed(rows[0], error)]
        return [each for row in rows for each in self._isolated([row])]

    def _answer(self, rows: Sequence[Asked]) -> list[Answered]:
        began = time.perf_counter()
        prompts = [row.question.prompt for row in rows]
        self._checkpoint.refuse_placeholders(prompts)
        pictures = [row.question.images[:] for row in rows]
        inputs = self._checkpoint.inputs(pictures, prompts, self._session)
        answers = self._checkpoint.answer(inputs, rows[0].question.max_new_tokens)
        seconds = time.perf_counter() - began
        counts = self._counts()
        return [Answered(row.id, text, *tokens, seconds) for row, text, tokens in zip(rows, answers, counts, strict=True)]

    def _converse(self, row: Asked) -> list[Answered]:
        began, counts = time.perf_counter(), list[tuple[int, int]]()
        prompts = [turn.prompt for turn in row.question.turns]
        self._checkpoint.refuse_placeholders(prompts)
        answers = self._checkpoint.converse(
            row.question.images[:],
            prompts,
            row.question.max_new_tokens,
            self._session,
            # The turn that brings the pictures is the one to be counted.
            lambda: counts.extend(self._counts() if not counts else ()),
        )
        return [Answered(row.id, answers, *counts[0], time.perf_counter() - began)]

    def _counts(self) -> list[tuple[int, int]]:
        """Visual tokens of each sample of the last request, before the recipe and entering the last layer."""
        trace = self._session.trace
        last = trace.alive(self._checkpoint.layers - 1)
        return [
            (sum(rows * columns for rows, columns in grids), sum(map(len, kept)))
            for grids, kept in zip(trace.grids, last, strict=True)
        ]


def _is_conversation(row: Asked) -> bool:
    return len(row.question.turns) > 1
