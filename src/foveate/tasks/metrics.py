"""How a prediction is scored against the answers that count as right: every metric gives a number in 0..1.

Besides those here, a function of a prediction and the answers may be one: installed packages offer theirs by entry points of
the group ``foveate.metrics``, and ``module:function`` names one that can be imported, from the working directory, too.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from numbers import Real
from pathlib import Path

from foveate.core.errors import FoveateError

from .vqa import vqa

Metric = Callable[[str, Sequence[str]], float]
"""Of a prediction and the answers that count as right."""

ENTRY_POINTS = "foveate.metrics"

ANLS_THRESHOLD = 0.5
"""Share of a text that must be right before it counts as misspelt and not as wrong."""

LEAST_OVERLAP = 0.5
"""Intersection over union from which a box is found."""

_NUMBER = re.compile(r"(?:(?<!\w)-)?(?:\d+\.?\d*|\.\d+)")

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def exact(prediction: str, answers: Sequence[str]) -> float:
    """1 if the prediction is one of the answers; case and spacing do not matter."""
    return float("".join(words(prediction)) in {"".join(words(answer)) for answer in answers})


def contains(prediction: str, answers: Sequence[str]) -> float:
    """1 if the words of an answer stand one after the other in the prediction."""
    said = f" {' '.join(words(prediction))} "
    return float(any(f" {' '.join(wanted)} " in said for answer in answers if (wanted := words(answer))))


def items(prediction: str, answers: Sequence[str]) -> float:
    """F1 of the items of a list separated by commas, in any order: the best over the answers."""
    said = Counter(_items(prediction))

    def f1(answer: str) -> float:
        wanted = Counter(_items(answer))
        return 2 * (said & wanted).total() / max(1, said.total() + wanted.total())

    return max(map(f1, answers))


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of ST-VQA (arXiv 1905.13648): the best over the answers.

    1 - d with the edit distance d over the longer text's length, and 0 from d = 0.5 on; case and runs of spaces do not
    matter.
    """
    try:
        from rapidfuzz.distance.Levenshtein import normalized_distance
    except ImportError as error:
        raise FoveateError("metric='anls': needs the package rapidfuzz; pip install 'foveate[data]'") from error
    said = _plain(prediction)
    distances = (normalized_distance(said, _plain(answer), score_cutoff=ANLS_THRESHOLD) for answer in answers)
    return max(1 - distance if distance < ANLS_THRESHOLD else 0.0 for distance in distances)


def point(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first two numbers of the prediction, x and y, lie in the box ``x0 y0 x1 y1`` of an answer."""
    said = numbers(prediction)[:2]
    if len(said) < 2:
        return 0.0
    x, y = said
    return float(any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in map(as_box, answers)))


def box(prediction: str, answers: Sequence[str]) -> float:
    """1 if the first four numbers of the prediction are a box that overlaps that of an answer by half of their union."""
    said = numbers(prediction)[:4]
    if len(said) < 4:
        return 0.0
    x0, y0, x1, y1 = said
    return float(any(overlap((x0, y0, x1, y1), as_box(answer)) >= LEAST_OVERLAP for answer in answers))


METRICS: dict[str, Metric] = {
    "exact": exact,
    "contains": contains,
    "items": items,
    "anls": anls,
    "vqa": vqa,
    "point": point,
    "box": box,
}
"""Metrics by the name under which tasks and data files ask for them."""

BOXED = ("point", "box")
"""Those whose answers are boxes."""


def metric(name: str) -> Metric:
    """The metric of a name: one in `METRICS`, an entry point of the group ``foveate.metrics``, or ``module:function``.

    Raises:
        FoveateError: if there is none, or it cannot be imported. One that is not of `METRICS` raises it, too, where it fails
            or gives anything but a number in [0, 1].
    """
    return METRICS[name] if name in METRICS else _own(name)


@cache
def _own(name: str) -> Metric:
    """A metric that somebody else wrote."""
    points = entry_points(group=ENTRY_POINTS)
    found = list(dict.fromkeys(point.value for point in points if point.name == name))
    if len(found) > 1:
        raise FoveateError(
            f"metric={name!r}: is offered by several packages; write the one that is meant: {', '.join(found)}"
        )
    if not found and not re.fullmatch(r"[\w.]+:[\w.]+", name):
        known = ", ".join(dict.fromkeys([*METRICS, *sorted(point.name for point in points)]))
        raise FoveateError(f"metric={name!r}: must be one of {known}, or a function of your own as module:function")
    # As of a script there; behind all else, so that no file there hides a package.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)
    try:
        score = EntryPoint(name, found[0] if found else name, ENTRY_POINTS).load()
    # A module may die of anything as it is imported.
    except Exception as error:
        raise FoveateError(f"metric={name!r}: cannot be imported ({_reason(error)})") from error
    if not callable(score):
        raise FoveateError(f"metric={name!r}: is {type(score).__name__}; must be a function of a prediction and the answers")

    def checked(prediction: str, answers: Sequence[str]) -> float:
        try:
            given = score(prediction, answers)
        except Exception as error:
            raise FoveateError(f"metric={name!r}: failed on the prediction {prediction!r} ({_reason(error)})") from error
        if not isinstance(given, Real) or not 0 <= float(given) <= 1:
            raise FoveateError(
                f"metric={name!r}: gave {given!r} for the prediction {prediction!r}; must be a number in [0, 1]"
            )
        return float(given)

    return checked


def _reason(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def numbers(text: str) -> list[float]:
    """The numbers in a text; a hyphen behind a word or a digit is no sign."""
    return [float(number) for number in _NUMBER.findall(text)]


def as_box(text: str) -> Box:
    """The box that an answer is."""
    found = numbers(text)
    if len(found) != 4 or not (found[0] < found[2] and found[1] < found[3]):
        raise FoveateError(f"answer={text!r}: must be a box 'x0 y0 x1 y1' with x0 < x1 and y0 < y1")
    return found[0], found[1], found[2], found[3]


def overlap(one: Box, other: Box) -> float:
    """Intersection over union of two boxes; 0 for a box whose corners are in the wrong order."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    if width <= 0 or height <= 0:
        return 0.0
    return width * height / (_area(one) + _area(other) - width * height)


def _area(box: Box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])


def _items(text: str) -> list[str]:
    return [" ".join(words(part)) for part in text.split(",") if words(part)]


def _plain(text: str) -> str:
    return " ".join(text.lower().split())
