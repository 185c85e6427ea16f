"""Tasks: questions about generated pictures with exact answers and evidence masks, and about your own data.

>>> from saccade import tasks
>>> asked = tasks.questions("attribute", n=8, seed=0)
>>> asked[0].score(["red"])
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from saccade.core.errors import SaccadeError

from . import spine
from .question import Question, Turn, evidence_cells

__all__ = ["SPINE", "TASKS", "Question", "Turn", "best_constant", "evidence_cells", "majority", "question", "questions"]

Draw = Callable[[str, np.random.Generator], Question | None]
"""Draws a picture and asks a question of the task about it; None where the picture allows none."""

_DRAWS: dict[str, Draw] = {**dict.fromkeys(spine.KINDS_OF, spine.ask)}
TASKS = tuple(_DRAWS)
"""Names of the generated tasks."""
SPINE = tuple(spine.KINDS_OF)
"""The six that ask about few things in small pictures."""

_SPLITS = {"train": 0, "validation": 1, "test": 2}
_MOST_CONSTANTS = 50


def questions(task: str, n: int, seed: int, split: str = "test") -> list[Question]:
    """``n`` questions of a task, each on a picture of its own; the same for the same arguments, disjoint across splits."""
    return [question(task, seed, index, split) for index in range(n)]


def question(task: str, seed: int, index: int, split: str = "test") -> Question:
    """Question number ``index`` of the stream that ``questions`` reads."""
    if task not in TASKS:
        raise SaccadeError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if split not in _SPLITS:
        raise SaccadeError(f"split={split!r}: must be one of {', '.join(_SPLITS)}")
    rng = np.random.default_rng([_SPLITS[split], seed, TASKS.index(task), index])
    while (asked := _DRAWS[task](task, rng)) is None:
        pass
    return asked


@lru_cache
def majority(task: str) -> str:
    """The constant answer that scores best on a generated task, estimated on 1,000 validation questions."""
    return best_constant(questions(task, 1000, seed=0, split="validation"))


def best_constant(asked: Sequence[Question]) -> str:
    """The answer that scores best when it is given to every turn of every question, among the most frequent ones."""
    accepted = Counter(answer for each in asked for turn in each.turns for answer in turn.answers)
    frequent = sorted(accepted, key=lambda answer: (-accepted[answer], answer))[:_MOST_CONSTANTS]
    return max(frequent, key=lambda answer: sum(each.score([answer] * len(each.turns)) for each in asked))
