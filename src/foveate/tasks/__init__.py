"""Tasks: questions about generated pictures with exact answers and evidence masks, about text, and about your own data.

>>> from foveate import tasks
>>> asked = tasks.questions("attribute", n=8, seed=0)
>>> asked[0].score(["red"])
>>> own = tasks.read("receipts.jsonl", metric="anls")
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np

from foveate.core.errors import FoveateError

from . import fields, pages, passages, series, spine
from .board import Drawn
from .files import read
from .question import Question, Turn, evidence_cells

__all__ = [
    "DRAWN",
    "SPINE",
    "TASKS",
    "TEXTS",
    "VIDEOS",
    "Question",
    "Turn",
    "best_constant",
    "evidence_cells",
    "majority",
    "question",
    "questions",
    "read",
]

SPINE = tuple(spine.KINDS_OF)
"""The six tasks that ask about few things in small pictures."""

DRAWN: dict[str, Callable[[np.random.Generator], Drawn]] = {
    "document": pages.document,
    "chart": pages.chart,
    "screen": pages.screen,
    "dense": fields.dense,
    "needle": fields.needle,
    "relation": fields.relation,
    "caption": fields.caption,
    "dialogue": fields.dialogue,
    "compare": series.compare,
    "events": series.events,
    "moment": series.moment,
    "stream": series.stream,
}
"""The tasks behind them: what draws the pictures of each."""

VIDEOS = ("events", "moment", "stream")
"""Those whose pictures are the frames of a video."""

TASKS = (*SPINE, *DRAWN)
"""Names of the generated tasks about pictures."""

TEXTS = tuple(passages.PASSAGES)
"""Those about text alone, for models of text."""

_TURNS = {"dialogue": 3}
_METRICS = {"caption": "items"}
_MAX_NEW_TOKENS = {"caption": 48}

_SPLITS = {"train": 0, "validation": 1, "test": 2}
_MOST_CONSTANTS = 50


def questions(task: str, n: int, seed: int, split: str = "test") -> list[Question]:
    """``n`` questions of a task, each on its own picture or text; the same for the same arguments, disjoint in splits."""
    return [question(task, seed, index, split) for index in range(n)]


def question(task: str, seed: int, index: int, split: str = "test") -> Question:
    """Question number ``index`` of the stream that ``questions`` reads."""
    every = (*TASKS, *TEXTS)
    if task not in every:
        raise FoveateError(f"task={task!r}: must be one of {', '.join(every)}")
    if split not in _SPLITS:
        raise FoveateError(f"split={split!r}: must be one of {', '.join(_SPLITS)}")
    rng = np.random.default_rng([_SPLITS[split], seed, every.index(task), index])
    if task in TEXTS:
        return passages.ask(task, rng)
    while (asked := spine.ask(task, rng) if task in SPINE else _ask(task, rng)) is None:
        pass
    return asked


def _ask(task: str, rng: np.random.Generator) -> Question | None:
    """Draw pictures and ask as many different questions as the task has turns; None where they allow too few."""
    drawn, wanted = DRAWN[task](rng), _TURNS.get(task, 1)
    turns: list[Turn] = []
    for _ in range(6 * wanted):
        turn = drawn.ask(rng)
        # A later turn asks about something else, or what the first one kept would do.
        if turn is not None and not any(np.array_equal(turn.evidence, other.evidence) for other in turns):
            turns.append(turn)
        if len(turns) == wanted:
            break
    if len(turns) < wanted:
        return None
    metric, longest = _METRICS.get(task, "exact"), _MAX_NEW_TOKENS.get(task, 16)
    return Question(task, drawn.images, tuple(turns), metric, longest, task in VIDEOS)


@lru_cache
def majority(task: str) -> str:
    """The constant answer that scores best on a generated task, estimated on 1,000 validation questions."""
    return best_constant(questions(task, 1000, seed=0, split="validation"))


def best_constant(asked: Sequence[Question]) -> str:
    """The answer that scores best when it is given to every turn of every question, among the most frequent ones."""
    accepted = Counter(answer for each in asked for turn in each.turns for answer in turn.answers)
    frequent = sorted(accepted, key=lambda answer: (-accepted[answer], answer))[:_MOST_CONSTANTS]
    return max(frequent, key=lambda answer: sum(each.score([answer] * len(each.turns)) for each in asked))
