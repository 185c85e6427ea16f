"""The questions of a bench: of a generated task, or the user's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from foveate import tasks
from foveate.bench.folder import Settings
from foveate.checkpoint import REFERENCES, load_processor, parse_model_args, refusal
from foveate.core.errors import FoveateError
from foveate.models.text_processor import TextProcessor
from foveate.tasks import Question, files
from foveate.tasks.metrics import BOXED, METRICS


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


SHORT = "Answer with a single word or short phrase. Write numbers as words."
SHORT_LIST = "Answer with a list of short phrases, separated by commas."
"""What generated tasks add to a prompt, as benchmarks for real models do; the latter where a list is asked for."""


@dataclass(frozen=True)
class Wording:
    """How generated questions are asked and scored.

    metric: instead of each task's own; None for that.
    short: whether prompts ask for a short answer. Reference models were trained on the prompts as they are, and do not know
        these words; others answer in sentences where nobody tells them not to.
    """

    metric: str | None
    short: bool

    @classmethod
    def of(cls, model: str, metric: str | None) -> Wording:
        """The one for a model, by its name; refuses metrics that generated answers cannot have."""
        if metric is not None and metric not in METRICS.keys() - set(BOXED):
            some = ", ".join(name for name in METRICS if name not in BOXED)
            raise FoveateError(f"metric={metric!r}: must be one of {some}; {' and '.join(BOXED)} are for --data with boxes")
        return cls(metric, model not in REFERENCES and _knows(load_processor(model).tokenizer, SHORT))

    def __call__(self, question: Question) -> Question:
        """A generated question so worded."""
        turns = question.turns
        # A word is what questions about text ask for, and their numbers are digits.
        if self.short and question.images:
            wanted = SHORT_LIST if question.metric == "items" else SHORT
            turns = tuple(replace(turn, prompt=f"{turn.prompt}\n{wanted}") for turn in turns)
        return replace(question, turns=turns, metric=self.metric or question.metric)


def _knows(tokenizer: Any, text: str) -> bool:
    """Whether a tokenizer has all words of a text."""
    return tokenizer.unk_token_id is None or tokenizer.unk_token_id not in tokenizer(text).input_ids


def ask(settings: Settings, task: str) -> list[Question]:
    """The questions of a task; where the settings name a data file, that is the one task."""
    if settings.data is not None:
        return _own(settings)[0]
    worded = Wording(settings.metric, settings.short)
    return [worded(question) for question in tasks.questions(task, settings.n, settings.seed)]


def best_constant(settings: Settings, task: str) -> tuple[str, list[float]]:
    """The answer that scores best when it is always given, and what it scores on each question."""
    asked = ask(settings, task)
    constant = tasks.majority(task) if settings.data is None else tasks.best_constant(asked)
    return constant, [each.score([constant] * len(each.turns)) for each in asked]


def sift(
    path: Path | str, model: str, model_args: Mapping[str, Any] | None = None, text: bool = False, **asked: Any
) -> tuple[list[Question], list[str]]:
    """All in a data file that a model, loaded so, can be asked, and a line about each question that it cannot.

    ``asked``: of `foveate.tasks.files.sift`. ``text``: whether there may be questions without a picture, as there may for
    a text model.
    """
    processor = load_processor(model, model_args)
    text = text or isinstance(processor, TextProcessor)
    return files.sift(path, partial(refusal, processor), text=text, **asked)


@lru_cache(maxsize=1)
def _own(settings: Settings) -> tuple[list[Question], list[str]]:
    """Kept, because every picture is opened and processed to see that it can be."""
    assert settings.data is not None
    assert settings.metric is not None
    arguments, longest = parse_model_args(settings.model_args), settings.max_new_tokens or files.MAX_NEW_TOKENS
    return sift(settings.data, settings.model, arguments, metric=settings.metric, n=settings.n, max_new_tokens=longest)
