"""``--tasks`` or ``--data``: what is asked, from the options of ``bench``, ``tune`` and ``probe``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from foveate import tasks
from foveate.bench.questions import sift
from foveate.checkpoint import evaluation, is_text
from foveate.cli.console import diagnostics
from foveate.core.errors import FoveateError
from foveate.tasks import Question, files


@dataclass(frozen=True)
class OwnData:
    """The options about the user's own questions."""

    path: Path | None = None
    metric: str | None = None
    max_new_tokens: int | None = None

    def divide(
        self, share: float, seed: int, model: str, model_args: Mapping[str, Any] | None = None
    ) -> tuple[list[Question], list[Question]]:
        """All that ``model``, loaded so, can be asked, in two parts that share no picture, neither of them empty."""
        assert self.path is not None
        asked, left_out = sift(self.path, model, model_args, **self.asked())
        self.warn(left_out)
        parts = files.divide(asked, share, seed)
        if not all(parts):
            first, second = map(len, parts)
            what = "about more pictures: divided by picture," if any(each.images for each in asked) else "of more kinds:"
            raise FoveateError(
                f"data={str(self.path)!r}: must have questions {what} these are {first} and {second} questions, and neither "
                "part may be empty"
            )
        return parts

    @staticmethod
    def warn(left_out: Sequence[str]) -> None:
        """Name the questions that are not asked."""
        for line in left_out:
            diagnostics().print(f"left out: {line}", markup=False, soft_wrap=True)

    def asked(self) -> dict[str, Any]:
        """How they are scored and how long answers may be, defaults filled in."""
        metric, longest = self.metric or files.METRIC, self.max_new_tokens or files.MAX_NEW_TOKENS
        return {"metric": metric, "max_new_tokens": longest}

    def describe(self) -> dict[str, Any]:
        """What tells measurements on this file from those on another; empty without a file."""
        if self.path is None:
            return {}
        return {"data": str(self.path), "digest": files.digest(self.path), **self.asked()}


GENERATED = OwnData()
"""No data of one's own."""


def task_names(text: str | None, own: OwnData, model: str) -> Sequence[str]:
    """The tasks that are asked for: generated ones, or the one that the data file is."""
    if own.path is None:
        if own.max_new_tokens is not None:
            raise FoveateError(f"max_new_tokens={own.max_new_tokens!r}: is for your own data; give --data as well")
        return parse_tasks("all" if text is None else text, model)
    if text is not None:
        raise FoveateError(f"tasks={text!r}: cannot be measured together with data={str(own.path)!r}; give one of them")
    return [own.path.absolute().stem]


def parse_tasks(text: str, model: str) -> Sequence[str]:
    """Task names from a list separated by commas; ``all`` are all that a model can be asked, or was taught."""
    if text.strip() == "all":
        return tuple(evaluation(model)) or _tasks(model)
    names, every = [name.strip() for name in text.split(",")], (*tasks.TASKS, *tasks.TEXTS)
    for name in names:
        if name not in every:
            close = get_close_matches(name, every, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"must be all or some of {', '.join(every)}"
            raise FoveateError(f"tasks={name!r}: {hint}")
    asked = _tasks(model)
    for name in names:
        if name not in asked:
            what = "is about text alone" if name in tasks.TEXTS else "asks about pictures, which a text model does not see"
            raise FoveateError(f"tasks={name!r}: {what}; {model} is asked some of {', '.join(asked)}")
    return names


def reads_text(model: str, model_args: Mapping[str, Any] | None = None) -> bool:
    """Whether ``model``, loaded so, reads text alone; not, if nobody knows: what is wrong is said when it is loaded."""
    try:
        return is_text(model, model_args)
    except FoveateError:
        return False


def _tasks(model: str) -> tuple[str, ...]:
    """Those about pictures, or those that a text model can be asked."""
    try:
        return tasks.TEXTS if is_text(model) else tasks.TASKS
    except FoveateError:  # what is wrong with the model is said when it is loaded
        return (*tasks.TASKS, *tasks.TEXTS)
