"""How a prediction is scored against the answers that count as right: every metric gives a number in 0..1."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

from saccade.core.errors import SaccadeError

Metric = Callable[[str, Sequence[str]], float]


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers; case and spacing do not matter."""
    return float("".join(words(prediction)) in {"".join(words(answer)) for answer in answers})


def items(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the items of a list separated by commas, in any order: the best over the answers."""
    said = Counter(_items(prediction))

    def f1(answer: str) -> float:
        wanted = Counter(_items(answer))
        return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())

    return max(map(f1, answers))


def _items(text: str) -> list[str]:
    return [" ".join(words(part)) for part in text.split(",") if words(part)]


METRICS: dict[str, Metric] = {"exact": exact, "items": items}
"""Metrics by the name under which tasks and data files ask for them."""


def metric(name: str) -> Metric:
    """The metric of a name; refuses others with the names there are."""
    if name not in METRICS:
        raise SaccadeError(f"metric={name!r}: must be one of {', '.join(METRICS)}")
    return METRICS[name]
