"""A tune without a model: questions are numbers, and a made-up model answers them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from foveate.bench.probes import Hints
from foveate.core.errors import FoveateError
from foveate.core.method import Method
from foveate.core.recipe import Recipe
from foveate.tune.answer import Answer
from foveate.tune.evidence import Answered
from foveate.tune.goal import DROP, Goal
from foveate.tune.journal import Tried
from foveate.tune.run import Ask, Budget, Folder, Result, Settings, tune
from tests.methods.bodiless import traits

LOSS = {"uniform": 0.5, "random": 0.6, "hiprune": 0.05, "scope": 0.2, "snapkv": 0.02, "downsample": 0.5, "pool": 0.5}
"""Of the made-up methods' answers, the share that is lost with all tokens."""


@dataclass(frozen=True)
class Hard:
    """A question about one picture, so hard."""

    part: str
    hard: float
    images: tuple[None, ...] = (None,)


@dataclass
class MadeUp:
    """Answers by a formula: every question is so hard, every method loses so much of what it drops."""

    calls: list[tuple[str, int]] = field(default_factory=list)
    before: Callable[[Recipe], None] = lambda recipe: None
    luck: float = 0.0
    """How much better than on held-out questions recipes look in the search."""

    def __call__(self, recipe: Recipe, questions: Sequence[Any]) -> Answered:
        self.before(recipe)
        self.calls.append((str(recipe), len(questions)))
        keep = np.prod([_keep(method) for method in recipe.methods]) if recipe.methods else 1.0
        loss = sum(LOSS[method.name] * (1 - _keep(method)) for method in recipe.methods)
        scores = tuple(float(q.hard < 0.95 - max(0.0, loss - (self.luck if q.part == "search" else 0))) for q in questions)
        ratios = {"prefill": (0.1 + 0.9 * float(keep),) * 2} if recipe.methods else {}
        return Answered(scores, (1000.0 * float(keep),) * len(questions), ratios)


def _keep(method: Method) -> float:
    return float(getattr(method, method.budgeted))


@dataclass
class Log:
    """A watcher that remembers."""

    trials: list[Tried] = field(default_factory=list)
    validated: list[str] = field(default_factory=list)
    unmodified: tuple[int, int] = (0, 0)

    def began(self, questions: Sequence[Any], scores: Sequence[float]) -> None:
        self.unmodified = len(questions), len(scores)

    def tried(self, tried: Tried) -> None:
        self.trials.append(tried)

    def validating(self, recipe: str, n: int, answers: int) -> None:
        self.validated.append(recipe)


def stream(part: str, most: int = 10**9) -> Ask:
    """An endless stream (or one of ``most`` questions) of the difficulty of questions."""

    def ask(task: str, start: int, stop: int) -> Sequence[Any]:
        seeds = [[len(part), len(task), number] for number in range(start, min(stop, most))]
        return [Hard(part, float(np.random.default_rng(seed).random())) for seed in seeds]

    return ask


def goal(**changed: Any) -> Goal:
    return Goal(**({"target": "prefill", "bounded": DROP, "bound": 0.05} | changed))


Tune = Callable[..., Result]


@pytest.fixture
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tune:
    """Runs a tune of 20 trials among methods whose numbers are known, without waiting for the disk."""
    monkeypatch.setattr(os, "fsync", lambda file: None)

    def run(
        answer: Answer | None = None,
        aim: Goal | None = None,
        methods: Sequence[str] = ("hiprune", "scope", "random", "uniform"),
        trials: int = 20,
        watcher: Log | None = None,
        resume: bool = False,
        out: str = "out",
        held: Ask | None = None,
        hints: Hints | None = None,
        **changed: Any,
    ) -> Result:
        settings = Settings(
            "made up", ("one", "three"), tuple(methods), aim or goal(), False, 0, "cpu", "float32", 25, None, (50, 200, 400)
        )
        folder = Folder(tmp_path / out, settings, resume=resume)
        budget = Budget(**({"minutes": 10, "trials": trials, "validate": 500} | changed))
        made_up, log = answer or MadeUp(), watcher or Log()
        found = tune(folder, traits(), budget, hints or Hints(), made_up, stream("search"), held or stream("held"), log)
        folder.conclude(found, {})
        return found

    return run


def refuse(name: str) -> Callable[[Recipe], None]:
    """A check that does not host a method."""

    def check(recipe: Recipe) -> None:
        if any(method.name == name for method in recipe.methods):
            raise FoveateError(f"{name}: not on this model; use another")

    return check
