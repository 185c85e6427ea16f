"""Answers questions under a recipe, and times it beside the unmodified model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from foveate.checkpoint import Checkpoint
from foveate.core.recipe import Recipe
from foveate.core.report import Report
from foveate.tasks import Question
from foveate.tune.evidence import Answered

_COMPARED, _EVERY = (1, 2), 8
"""Of every eight batches, those that the unmodified model answers as well, right after the recipe: seconds that lie minutes
apart do not compare on a machine that others share. Not the first: it pays for allocations and kernel choices."""

Answer = Callable[[Recipe, Sequence[Question]], Answered]
"""Answers questions under a recipe; may raise anything that the recipe does."""


@dataclass(frozen=True)
class ModelAnswers:
    """Answers with a model, in batches; ``advance`` is told how many more questions are answered."""

    checkpoint: Checkpoint
    batch_size: int
    seed: int
    advance: Callable[[int], None] = lambda questions: None

    def __call__(self, recipe: Recipe, questions: Sequence[Question]) -> Answered:
        """Scores in the order of the questions."""
        scores, kv = [0.0] * len(questions), [0.0] * len(questions)
        ratios: dict[str, tuple[float, ...]] = {}
        split = list(batches(questions, self.batch_size))
        for number, places in enumerate(split):
            batch = [questions[place] for place in places]
            predictions, report = self._ask(recipe, batch, self.seed + number)
            for place, question, said in zip(places, batch, predictions, strict=True):
                scores[place], kv[place] = question.score(said), sum(report.kv_bytes) / report.samples
            if recipe.methods and (number % _EVERY in _COMPARED or len(split) == 1):
                _, unmodified = self._ask(Recipe(), batch, 0)
                for cost, ratio in _ratios(report, unmodified).items():
                    ratios[cost] = (*ratios.get(cost, ()), ratio)
            self.advance(len(batch))
        return Answered(tuple(scores), tuple(kv), ratios)

    def _ask(self, recipe: Recipe, batch: Sequence[Question], seed: int) -> tuple[list[list[str]], Report]:
        longest = batch[0].max_new_tokens
        with self.checkpoint.attach(recipe, seed) as session:
            if len(batch[0].turns) > 1:
                (question,) = batch
                prompts, reports = [turn.prompt for turn in question.turns], list[Report]()
                said = self.checkpoint.converse(
                    question.images, prompts, longest, session, lambda: reports.append(session.report)
                )
                return [said], reports[0]  # of the turn that brings the pictures
            inputs = self.checkpoint.inputs([q.images for q in batch], [q.turns[0].prompt for q in batch], session)
            return [[answer] for answer in self.checkpoint.answer(inputs, longest)], session.report


def batches(questions: Sequence[Question], size: int) -> Iterator[list[int]]:
    """Places of questions that can be asked at once: of one shape, whatever their task; a conversation goes alone."""
    groups: dict[tuple[int, int, int], list[int]] = {}
    for place, question in enumerate(questions):
        shape = (len(question.images), len(question.turns), question.max_new_tokens)
        groups.setdefault(shape, []).append(place)
    for (_, turns, _), places in groups.items():
        step = size if turns == 1 else 1
        yield from (places[start : start + step] for start in range(0, len(places), step))


def _ratios(report: Report, unmodified: Report) -> dict[str, float]:
    ratios = {
        "prefill": report.prefill_seconds / unmodified.prefill_seconds,
        "ttft": report.first_token_seconds / unmodified.first_token_seconds,
        "total": report.total_seconds / unmodified.total_seconds,
    }
    if report.decode_steps and unmodified.decode_steps:
        step, step_before = (r.decode_seconds / r.decode_steps for r in (report, unmodified))
        ratios["decode"] = step / step_before
    return ratios
