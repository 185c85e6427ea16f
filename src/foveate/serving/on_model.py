"""Answers to rows: on a model in this process, one batch at a time, whatever becomes of single rows."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image

from foveate.checkpoint import Checkpoint, load, parse_model_args, resolve_device
from foveate.serving.answered import Answered, Answerer
from foveate.serving.asked import ID, Asked


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


@dataclass(frozen=True)
class _Opened:
    """A row with its pictures, the first prompt and those of further turns, and the seconds that opening took."""

    row: Asked
    pictures: Sequence[Image.Image]
    prompt: str
    further: list[str]
    seconds: float


class ModelAnswers:
    """A model with a recipe attached."""

    def __init__(self, checkpoint: Checkpoint, recipe: str, seed: int) -> None:
        self._checkpoint = checkpoint
        self._session = checkpoint.attach(recipe, seed)

    def __call__(self, rows: Sequence[Asked]) -> list[Answered]:
        """As `Answerer`: rows that are asked alike at once, conversations one by one."""
        found: dict[ID, Answered] = {}
        alike: dict[object, list[_Opened]] = {}
        for row in rows:
            try:
                opened = self._open(row)
            # What is wrong with a picture is no reason to answer its neighbours one by one.
            except Exception as error:
                found[row.id] = Answered.failed(row, error)
            else:
                alike.setdefault(row.key if opened.further else row.question.max_new_tokens, []).append(opened)
        for group in alike.values():
            found |= {answered.id: answered for answered in self._isolated(group)}
        return [found[row.id] for row in rows]

    def _open(self, row: Asked) -> _Opened:
        began = time.perf_counter()
        prompt, *further = [turn.prompt for turn in row.question.turns]
        self._checkpoint.refuse_placeholders([prompt, *further])
        return _Opened(row, row.question.images[:], prompt, further, time.perf_counter() - began)

    def _isolated(self, group: Sequence[_Opened]) -> list[Answered]:
        """Answer them at once; if that fails, each alone."""
        try:
            return self._converse(group[0]) if group[0].further else self._answer(group)
        # A row may die of anything: memory, a picture that the processor refuses, a bug in a third-party method.
        except Exception as error:
            if len(group) == 1:
                return [Answered.failed(group[0].row, error)]
        return [answered for each in group for answered in self._isolated([each])]

    def _answer(self, group: Sequence[_Opened]) -> list[Answered]:
        began = time.perf_counter()
        inputs = self._checkpoint.inputs([each.pictures for each in group], [each.prompt for each in group], self._session)
        answers = self._checkpoint.answer(inputs, group[0].row.question.max_new_tokens)
        seconds = time.perf_counter() - began + sum(each.seconds for each in group)
        counts = self._counts()
        return [
            Answered(each.row.id, text, *tokens, seconds) for each, text, tokens in zip(group, answers, counts, strict=True)
        ]

    def _converse(self, opened: _Opened) -> list[Answered]:
        began, counts = time.perf_counter(), list[tuple[int, int]]()
        answers = self._checkpoint.converse(
            opened.pictures,
            [opened.prompt, *opened.further],
            opened.row.question.max_new_tokens,
            self._session,
            # The turn that brings the pictures is the one to be counted.
            lambda: counts.extend(self._counts() if not counts else ()),
        )
        return [Answered(opened.row.id, answers, *counts[0], time.perf_counter() - began + opened.seconds)]

    def _counts(self) -> list[tuple[int, int]]:
        """Visual tokens of each sample of the last request, before the recipe and entering the last layer."""
        trace = self._session.trace
        last = trace.alive(self._checkpoint.layers - 1)
        return [
            (sum(rows * columns for rows, columns in grids), sum(map(len, kept)))
            for grids, kept in zip(trace.grids, last, strict=True)
        ]
