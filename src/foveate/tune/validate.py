"""The promise: what a recipe showed in the search has to hold on questions that the search never saw."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from foveate.bench.cells import PICTURE_POINTS, TEXT_POINTS
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe, build
from foveate.tasks import Question
from foveate.tune.answer import Answer
from foveate.tune.evidence import Answered, Evidence, Interval, paired
from foveate.tune.goal import DROP, Goal
from foveate.tune.journal import Journal, Tried
from foveate.tune.search import Arena, Watcher
from foveate.tune.space import KEEP

MOST_LOOKS = 5
"""So many recipes are validated at most: who looks long enough will find one that passes by luck."""

_HALVINGS = 6

Held = Callable[[int, int], Sequence[Question]]
"""Held-out questions from a number up to another; fewer, or none, where there are no more."""


@dataclass(frozen=True)
class Look:
    """A recipe on held-out questions, those with the numbers from ``start`` up to ``stop``.

    kept: whether the estimate is within the bound.
    proved: whether the upper end of its interval is, too; the k-th look takes an interval of 1 - 0.05 / k, so that looking
        again and again does not prove by luck.
    answered, unmodified: what it was judged by.
    """

    recipe: str
    start: int
    stop: int
    evidence: Evidence
    kept: bool
    proved: bool
    answered: Answered
    unmodified: Answered

    @classmethod
    def from_json(cls, found: dict[str, Any]) -> Look:
        """From what ``dataclasses.asdict`` made of it."""
        answers = {name: Answered.from_json(found[name]) for name in ("answered", "unmodified")}
        return cls(**{**found, "evidence": Evidence.from_json(found["evidence"]), **answers})


@dataclass(frozen=True)
class Baseline:
    """A point of reference at the winner's cost, on the same questions.

    It is random or uniform selection or a smaller picture, of text a random cache.

    ``ahead``: by how much the winner scores better.
    """

    recipe: str
    evidence: Evidence
    ahead: Interval

    @property
    def beaten(self) -> bool:
        """Whether the winner is better beyond noise."""
        return self.ahead.low > 0


def validate(
    goal: Goal, candidates: Sequence[Tried], answer: Answer, held: Held, n: int, journal: Journal, watcher: Watcher
) -> list[Look]:
    """Look at one candidate after the other, each on fresh questions, until one keeps the promise: it is the last."""
    looks = [Look.from_json(found) for found in journal.remembered("looks") or []]
    for candidate in candidates:
        known = next((look for look in looks if look.recipe == candidate.recipe), None)
        if known is not None and known.kept:
            return [*(look for look in looks if look is not known), known]
        if known is not None:
            continue
        start = max((look.stop for look in looks), default=0)
        questions = held(start, start + n) if len(looks) < MOST_LOOKS else ()
        if not questions:
            # A recipe that kept the promise in an earlier run may still come.
            continue
        # The unmodified model answers them, too.
        watcher.validating(candidate.recipe, len(questions), 2 * len(questions))
        looks.append(_look(goal, candidate.recipe, answer, questions, (start, start + n), len(looks) + 1))
        journal.remember("looks", [asdict(look) for look in looks])
        if looks[-1].kept:
            break
    return looks


def baselines(
    goal: Goal, winner: Look, answer: Answer, held: Held, arena: Arena, hosted: Sequence[str], watcher: Watcher
) -> Iterator[Baseline]:
    """What the points of reference reach at the winner's cost; those that no picture can be given are left out."""
    methods = {method.name for method in Recipe.parse(winner.recipe).methods}
    points = PICTURE_POINTS if set(PICTURE_POINTS) & set(hosted) else TEXT_POINTS
    names = [name for name in points if name in hosted and {name} != methods]
    if not names:
        return
    questions = held(winner.start, winner.stop)
    # What they cost depends on how many tokens they keep, not on which.
    keep = _keep_at_cost(goal.cost, names[0], winner.evidence.shares[goal.cost].value, arena)
    for name in names:
        recipe = _at(name, keep)
        watcher.validating(str(recipe), len(questions), len(questions))
        try:
            answered = answer(recipe, questions)
        except FoveateError:
            # A family may have no picture as small as that.
            continue
        yield Baseline(
            str(recipe), Evidence.of(answered, winner.unmodified), paired(winner.answered.scores, answered.scores)
        )


def _look(
    goal: Goal, recipe: str, answer: Answer, questions: Sequence[Question], numbers: tuple[int, int], look: int
) -> Look:
    before, answered = answer(Recipe(), questions), answer(Recipe.parse(recipe), questions)
    evidence = Evidence.of(answered, before)
    limited = goal.limited(evidence)
    if goal.bounded == DROP:
        limited = paired(before.scores, answered.scores, level=1 - 0.05 / look)
    return Look(recipe, *numbers, evidence, goal.within(evidence), limited.high <= goal.bound, answered, before)


def _at(name: str, keep: float) -> Recipe:
    """A point of reference with a budget."""
    return Recipe((build(name, {registry.get(name).budgeted: keep}),))


def _keep_at_cost(cost: str, name: str, most: float, arena: Arena) -> float:
    """The largest budget at which a baseline costs no more than ``most`` (the smallest, if all cost more)."""

    def costs(keep: float) -> float:
        return next(arena.climb(_at(name, keep))).shares[cost].value

    low, high = float(KEEP.low), float(KEEP.high)
    for _ in range(_HALVINGS):
        middle = float(f"{(low * high) ** 0.5:.3g}")
        low, high = (middle, high) if costs(middle) <= most else (low, middle)
    return low
