"""A model that does no better than always saying the same makes every comparison of methods worthless."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from foveate.bench.records import Answer
from foveate.bench.statistics import beats

REASONS = (
    "the prompt: is the processor's chat template the one that the checkpoint was trained with?",
    "the answers: does the model speak in sentences where the metric wants a word? Ask for a short answer, or try "
    "--metric contains (vqa also takes 2 for two)",
    "the task: a small or untuned model may not know it; leave it out, or take another checkpoint",
    "the questions: a few cannot tell a model from chance; ask more (--n)",
)
"""Why it may be, the likeliest first."""


@dataclass(frozen=True)
class Chance:
    """The unmodified model scores no better on a task than the best constant answer, beyond noise.

    prompt, answer, prediction: a question that it got wrong, where one is known.
    """

    task: str
    n: int
    score: float
    constant: str
    constant_score: float
    prompt: str | None = None
    answer: str | None = None
    prediction: str | None = None


def chance(
    task: str, scores: Sequence[float], constant: str, constant_scores: Sequence[float], answers: Sequence[Answer] = ()
) -> Chance | None:
    """What is to be said of a model that scores so on the questions of a task; None if it can do the task.

    ``constant_scores`` are those of always answering ``constant``, on the same questions; ``answers`` are the model's.
    """
    if beats(scores, constant_scores):
        return None
    found = Chance(task, len(scores), fmean(scores), constant, fmean(constant_scores))
    wrong = next((each for each in answers if each.score == 0), None)
    if wrong is None:
        return found
    return Chance(
        found.task,
        found.n,
        found.score,
        found.constant,
        found.constant_score,
        prompt=wrong.prompt,
        answer=wrong.answer,
        prediction=wrong.prediction,
    )
