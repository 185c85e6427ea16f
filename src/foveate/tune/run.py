"""A tune from beginning to end: search, validation, the baselines beside the winner, and the files."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from foveate.bench.chance import Chance
from foveate.bench.folder import claim, provenance
from foveate.bench.probes import Hints
from foveate.core.files import write_json, write_whole
from foveate.core.recipe import Recipe
from foveate.core.traits import Traits
from foveate.tasks import Question
from foveate.tune.answer import Answer
from foveate.tune.goal import Goal
from foveate.tune.hints import first_recipes
from foveate.tune.journal import Journal, Tried
from foveate.tune.search import RUNGS, Arena, Watcher, candidates, search
from foveate.tune.space import Space
from foveate.tune.validate import Baseline, Look, baselines, validate

Ask = Callable[[str, int, int], Sequence[Question]]
"""Questions of a task from a number up to another; fewer, or none, where there are no more."""


@dataclass(frozen=True)
class Settings:
    """What all trials of a folder have in common; others could not be compared with them.

    data, digest, metric, max_new_tokens, short, artifacts, model_args, system: as in `foveate.bench.folder.Settings`.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...]
    goal: Goal
    compose: bool
    seed: int
    device: str
    dtype: str
    batch_size: int
    companion: str | None
    rungs: tuple[int, ...] = RUNGS
    data: str | None = None
    digest: str | None = None
    metric: str | None = None
    max_new_tokens: int | None = None
    artifacts: str | None = None
    model_args: str | None = None
    system: str | None = None
    short: bool = False

    def to_json(self) -> dict[str, Any]:
        """As JSON reads it back."""
        return {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}


@dataclass(frozen=True)
class Budget:
    """When the search ends: after so many minutes, validation included, or so many trials in all."""

    minutes: float
    trials: int | None
    validate: int


@dataclass(frozen=True)
class Result:
    """What a tune found; ``winner`` is None where nothing kept the promise and the model is best left as it is."""

    tried: list[Tried]
    looks: list[Look]
    baselines: list[Baseline] = field(default_factory=list)

    @property
    def winner(self) -> Look | None:
        """The recipe that kept the promise: the last one looked at, if any."""
        return self.looks[-1] if self.looks and self.looks[-1].kept else None

    @property
    def recipe(self) -> Recipe:
        """What to run."""
        return Recipe.parse(self.winner.recipe) if self.winner else Recipe()


class Folder:
    """The folder of one tune: the journal, and what it came to."""

    def __init__(self, path: Path, settings: Settings, *, resume: bool = False) -> None:
        self._lock = claim(path, settings.to_json(), "tune", resume=resume)
        self.path = path
        self.settings = settings
        self._provenance = provenance("optuna")
        write_json(path / "settings.json", {**settings.to_json(), **self._provenance})
        self.journal = Journal(path, settings.seed)

    def conclude(self, result: Result, left_out: Mapping[str, str], chance: Chance | None = None) -> None:
        """Write the recipe and, beside it, the evidence for it.

        ``chance``: what is to be said of a model that does no better than always saying the same.
        """
        write_whole(self.path / "recipe.yaml", result.recipe.to_yaml().encode())
        evidence = {
            "recipe": str(result.recipe),
            "chance": None if chance is None else asdict(chance),
            "promise": str(self.settings.goal),
            "kept": result.winner is not None,
            "proved": result.winner is not None and result.winner.proved,
            "validation": [_without_answers(look) for look in result.looks],
            "baselines": [{**asdict(each), "beaten": each.beaten} for each in result.baselines],
            "trials": len(result.tried),
            "left_out": dict(left_out),
            "settings": self.settings.to_json(),
            **self._provenance,
        }
        write_json(self.path / "evidence.json", evidence)


def tune(
    folder: Folder,
    traits: Traits,
    budget: Budget,
    hints: Hints,
    answer: Answer,
    ask: Ask,
    ask_held: Ask,
    watcher: Watcher,
) -> Result:
    """Search, validate, compare. ``ask`` and ``ask_held`` must give different questions."""
    settings, journal = folder.settings, folder.journal
    questions = spread(ask, settings.tasks, 0, max(settings.rungs))
    pictures = max((len(question.images) for question in questions), default=1)
    space = Space.of(settings.methods, traits, settings.compose, pictures)
    for recipe in first_recipes(space, hints, settings.goal.starts):
        journal.plan(space.parameters(recipe))
    arena = Arena(answer, questions, settings.rungs, journal)
    watcher.began(*arena.begin())

    def held(start: int, stop: int) -> Sequence[Question]:
        return spread(ask_held, settings.tasks, start, stop)

    search(space, settings.goal, arena, journal, _Clock(budget, arena, journal).more, watcher)
    tried = journal.tried()
    looks = validate(settings.goal, candidates(settings.goal, tried), answer, held, budget.validate, journal, watcher)
    result = Result(tried, looks)
    if result.winner is None:
        return result
    compared = baselines(settings.goal, result.winner, answer, held, arena, settings.methods, watcher)
    return Result(tried, looks, list(compared))


def spread(ask: Ask, tasks: Sequence[str], start: int, stop: int) -> list[Question]:
    """Questions ``start`` to ``stop`` of a stream that takes one of each task in turn."""
    found: list[Question] = []
    rows = range(start // len(tasks), -(-stop // len(tasks)))
    columns = [ask(task, rows.start, rows.stop) for task in tasks]
    for row in range(len(rows)):
        for place, column in enumerate(columns):
            if start <= (rows.start + row) * len(tasks) + place < stop and row < len(column):
                found.append(column[row])
    return found


_NOTE_SECONDS = 5.0
"""So often the time spent is written down."""


class _Clock:
    """Whether there is time for more trials; what earlier runs in the folder took counts."""

    _LOOKS = 2
    """So many recipes are validated, as a rule, for which time is set aside."""

    def __init__(self, budget: Budget, arena: Arena, journal: Journal) -> None:
        self._budget = budget
        self._arena = arena
        self._journal = journal
        self._noted: float = journal.remembered("seconds") or 0.0
        self._began = time.monotonic() - self._noted

    def more(self) -> bool:
        """Look at the clock, and write down what it says now and then."""
        spent = time.monotonic() - self._began
        if spent > self._noted + _NOTE_SECONDS:
            self._journal.remember("seconds", spent)
            self._noted = spent
        # A look is answered under the recipe and unmodified; the two baselines come on top.
        each = self._budget.validate * self._arena.seconds_each
        reserved = min(each * (2 * self._LOOKS + 2), 30 * self._budget.minutes)
        trials = self._budget.trials
        return spent + reserved < 60 * self._budget.minutes and (trials is None or len(self._journal.tried()) < trials)


def _without_answers(look: Look) -> dict[str, Any]:
    return {name: content for name, content in asdict(look).items() if name not in ("answered", "unmodified")}
