"""All that a tune has done and plans to do, in a journal on disk: whatever ends it, what was finished stays finished."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from foveate.core.files import write_json
from foveate.tune.evidence import Evidence
from foveate.tune.goal import Goal

FINISHED, PRUNED, REFUSED, FAILED = "finished", "pruned", "refused", "failed"


@dataclass(frozen=True)
class Tried:
    """A trial that is over: how far it came and, if that was not to the end, why it was stopped.

    ``outcome``: finished, pruned, refused (by a check, with the reason) or failed (with the error).
    """

    number: int
    recipe: str
    outcome: str
    why: str
    evidence: Evidence | None


class Journal:
    """An Optuna study in the folder of a tune, and ``trials.json`` beside it, for people.

    A trial that was cut off comes again.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
        self._study = optuna.create_study(storage=storage, study_name="tune", load_if_exists=True)
        self._folder = folder
        self._seed = seed
        for trial in self._study.get_trials(states=(TrialState.RUNNING,)):
            self._study.tell(trial.number, state=TrialState.FAIL)
            self._study.enqueue_trial(trial.params)

    def plan(self, parameters: Mapping[str, Any]) -> None:
        """Try this first, unless it was planned before."""
        self._study.enqueue_trial(dict(parameters), skip_if_exists=True)

    def ask(self) -> optuna.Trial:
        """The next trial. What it draws follows from the seed and the trials so far, however often a tune is resumed."""
        seed = self._seed + 1_000_003 * len(self._study.get_trials(deepcopy=False))
        with warnings.catch_warnings():
            # Parameters depend on the method that is drawn, which is what `group` is for.
            warnings.simplefilter("ignore", ExperimentalWarning)
            self._study.sampler = optuna.samplers.TPESampler(multivariate=True, group=True, seed=seed % 2**32)
        return self._study.ask()

    def skip(self, trial: optuna.Trial) -> None:
        """Forget a trial that repeats another, or that drew no recipe."""
        self._study.tell(trial, state=TrialState.FAIL)

    def finish(self, trial: optuna.Trial, tried: Tried, goal: Goal) -> None:
        """Keep what became of a trial."""
        wanted = None
        if tried.evidence is not None:
            wanted = goal.wanted(tried.evidence).value
            trial.report(wanted, step=tried.evidence.n)
            trial.set_constraint("bound", goal.limited(tried.evidence).value - goal.bound)
        trial.set_user_attr("tried", asdict(tried))
        if tried.outcome == FINISHED:
            self._study.tell(trial, wanted)
        else:
            self._study.tell(trial, state=TrialState.PRUNED)
        write_json(self._folder / "trials.json", [asdict(each) for each in self.tried()])

    def tried(self) -> list[Tried]:
        """The trials that are over, in order."""
        over = self._study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        return [_tried(trial.user_attrs["tried"]) for trial in over]

    def remember(self, name: str, content: Any) -> None:
        """Keep something beside the trials: anything that JSON can hold."""
        self._study.set_user_attr(name, content)

    def remembered(self, name: str) -> Any:
        """What was kept under a name; None if nothing was."""
        return self._study.user_attrs.get(name)


def _tried(found: dict[str, Any]) -> Tried:
    evidence = found["evidence"]
    return Tried(**{**found, "evidence": Evidence.from_json(evidence) if evidence else None})
