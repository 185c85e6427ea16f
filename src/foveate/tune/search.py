"""The search: recipes are drawn, answer more and more questions, and stop as soon as nothing is to be hoped of them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Protocol

from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.tasks import Question
from foveate.tune.answer import Answer
from foveate.tune.evidence import Answered, Evidence
from foveate.tune.goal import DROP, Goal
from foveate.tune.journal import FAILED, FINISHED, PRUNED, REFUSED, Journal, Tried
from foveate.tune.space import Space

RUNGS = (50, 200, 800)
"""Questions after which a trial must have earned the next."""

_REPEATS = 50
"""So many draws in a row that were tried before or make no recipe, and there is nothing left to try."""


class Watcher(Protocol):
    """Follows a tune, to show it."""

    def tried(self, tried: Tried) -> None:
        """A trial is over."""

    def validating(self, recipe: str, n: int, answers: int) -> None:
        """A recipe, or a baseline beside the winner, goes to so many held-out questions, which takes so many answers."""


class Arena:
    """The questions of the search, and the unmodified model's answers to as many of them as were needed so far."""

    def __init__(self, answer: Answer, questions: Sequence[Question], rungs: Sequence[int], journal: Journal) -> None:
        self.rungs = sorted({min(rung, len(questions)) for rung in rungs})
        self.seconds_each: float = journal.remembered("seconds_each") or 0.0
        """What the unmodified model takes for a question, once it was asked."""
        self._answer = answer
        self._questions = questions
        self._journal = journal
        known = journal.remembered("unmodified")
        self._unmodified = Answered.from_json(known) if known else Answered()

    def climb(self, recipe: Recipe) -> Iterator[Evidence]:
        """The evidence at each rung, as long as it is asked for."""
        answered = Answered()
        for rung in self.rungs:
            answered += self._answer(recipe, self._questions[len(answered.scores) : rung])
            yield Evidence.of(answered, self._before(rung))

    def _before(self, rung: int) -> Answered:
        known = len(self._unmodified.scores)
        if known < rung:
            began = time.monotonic()
            self._unmodified += self._answer(Recipe(), self._questions[known:rung])
            self.seconds_each = (time.monotonic() - began) / (rung - known)
            self._journal.remember("seconds_each", self.seconds_each)
            self._journal.remember("unmodified", asdict(self._unmodified))
        return self._unmodified


def search(space: Space, goal: Goal, arena: Arena, journal: Journal, more: Callable[[], bool], watcher: Watcher) -> None:
    """Try recipes as long as there is time for ``more``; the journal holds what was tried before and what is planned."""
    seen = {tried.recipe for tried in journal.tried()}
    repeats = 0
    while repeats < _REPEATS and more():
        trial = journal.ask()
        try:
            recipe = space.suggest(trial)
        # Values that a method takes one by one but not together.
        except FoveateError:
            recipe = None
        if recipe is None or str(recipe) in seen:
            repeats += 1
            journal.skip(trial)
            continue
        repeats = 0
        seen.add(str(recipe))
        rivals = [tried for tried in journal.tried() if tried.outcome == FINISHED]
        outcome, why, evidence = _climb(recipe, goal, arena, rivals, more)
        tried = Tried(trial.number, str(recipe), outcome, why, evidence)
        journal.finish(trial, tried, goal)
        watcher.tried(tried)


def _climb(
    recipe: Recipe, goal: Goal, arena: Arena, rivals: Sequence[Tried], more: Callable[[], bool]
) -> tuple[str, str, Evidence | None]:
    """How far a recipe comes: outcome, why, and what it showed on the way."""
    evidence = None
    try:
        for evidence in arena.climb(recipe):
            if evidence.n == arena.rungs[-1]:
                break
            reason = give_up(goal, evidence, rivals) or (None if more() else "the time was up")
            if reason is not None:
                return PRUNED, reason, evidence
    except FoveateError as error:
        return REFUSED, str(error), evidence
    # A method may die of anything; the others are not to blame.
    except Exception as error:
        return FAILED, " ".join(f"{type(error).__name__}: {error}".split()), evidence
    return FINISHED, "", evidence


def give_up(goal: Goal, evidence: Evidence, rivals: Sequence[Tried]) -> str | None:
    """Why a trial with this evidence is not worth more questions; None if it is."""
    if goal.hopeless(evidence):
        return f"{goal.bounded} beyond {goal.bound:g}"
    if goal.target != DROP and goal.wanted(evidence).low >= 1:
        return "saves nothing"
    for rival in rivals:
        if rival.evidence is not None and goal.within(rival.evidence) and goal.dominated(evidence, rival.evidence):
            return f"behind #{rival.number}"
    return None


def candidates(goal: Goal, tried: Sequence[Tried]) -> list[Tried]:
    """Trials that seem to be within the bound and to save something; the one of which most is to be hoped first."""
    hopes = {
        each.number: goal.hope(each.evidence)
        for each in tried
        if each.evidence is not None
        and each.outcome in (FINISHED, PRUNED)
        and goal.within(each.evidence)
        and goal.wanted(each.evidence).value < 1
    }
    return sorted((each for each in tried if each.number in hopes), key=lambda each: -hopes[each.number])
