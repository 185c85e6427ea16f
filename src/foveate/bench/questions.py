"""The questions of a bench: of a generated task, or the user's own."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean

from foveate import tasks
from foveate.bench.folder import Settings
from foveate.checkpoint import load_processor, parse_model_args, refusal
from foveate.tasks import Question, files


def about_data(
    settings: Settings, path: Path, metric: str = files.METRIC, max_new_tokens: int = files.MAX_NEW_TOKENS
) -> Settings:
    """The settings of a bench on a data file: at most as many questions as it holds, and what tells it from others.

    All of it is read, so that what is wrong with it shows before anything is measured.
    """
    own = replace(
        settings, data=str(path), metric=metric or files.METRIC, max_new_tokens=max_new_tokens or files.MAX_NEW_TOKENS
    )
    asked, left_out = _own(own)
    return replace(own, n=len(asked), digest=files.digest(path, len(asked) + len(left_out)))


def left_out(settings: Settings) -> list[str]:
    """A line about each question of the data file that the model's processor refuses the pictures of."""
    return _own(settings)[1]


def ask(settings: Settings, task: str) -> list[Question]:
    """The questions of a task; where the settings name a data file, that is the one task."""
    return tasks.questions(task, settings.n, settings.seed) if settings.data is None else _own(settings)[0]


def best_constant(settings: Settings, task: str) -> tuple[str, float]:
    """The answer that scores best when it is always given, and its mean score."""
    asked = ask(settings, task)
    constant = tasks.majority(task) if settings.data is None else tasks.best_constant(asked)
    return constant, fmean(each.score([constant] * len(each.turns)) for each in asked)


@lru_cache(maxsize=1)
def _own(settings: Settings) -> tuple[list[Question], list[str]]:
    """Kept, because every picture is opened and processed to see that it can be."""
    assert settings.data is not None
    assert settings.metric is not None
    refuses = partial(refusal, load_processor(settings.model, parse_model_args(settings.model_args)))
    longest = settings.max_new_tokens or files.MAX_NEW_TOKENS
    return files.sift(settings.data, refuses, settings.metric, settings.n, longest)
