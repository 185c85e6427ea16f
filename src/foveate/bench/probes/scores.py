"""How well questions are answered under a recipe, and nothing else: no clock, no limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import foveate
from foveate.checkpoint import Checkpoint
from foveate.core.method import Method
from foveate.core.recipe import Recipe
from foveate.engine import Session
from foveate.tasks import Question


@dataclass(frozen=True)
class Scores:
    """Score of each question of a task, and the share of the visual tokens that came to the last layer."""

    values: list[float]
    kept: float


def scores(
    checkpoint: Checkpoint, recipe: Recipe | Method, questions: Sequence[Question], batch_size: int, seed: int = 0
) -> Scores:
    """Answer the questions of a task in batches (conversations one by one)."""
    size = batch_size if all(len(question.turns) == 1 for question in questions) else 1
    values, kept, shown = [], 0.0, 0.0
    for start in range(0, len(questions), size):
        batch = questions[start : start + size]
        with foveate.attach(checkpoint.model, recipe, seed=seed * len(questions) + start) as session:
            said = _answers(checkpoint, batch, session)
        values += [question.score(answers) for question, answers in zip(batch, said, strict=True)]
        report = session.report
        kept += report.visual_tokens[-1] * report.samples
        shown += report.original_visual_tokens * report.samples
    return Scores(values, kept / shown)


def _answers(checkpoint: Checkpoint, batch: Sequence[Question], session: Session) -> list[list[str]]:
    longest = batch[0].max_new_tokens
    prompts = [[turn.prompt for turn in question.turns] for question in batch]
    if len(prompts[0]) > 1:
        return [checkpoint.converse(question.images, asked, longest, session) for question, asked in zip(batch, prompts)]
    inputs = checkpoint.inputs([question.images for question in batch], [asked[0] for asked in prompts], session)
    return [[said] for said in checkpoint.answer(inputs, longest)]
