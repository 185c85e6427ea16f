"""Your own data as questions: JSON, CSV, TSV, parquet, or a folder that Hugging Face ``datasets`` saved.

A row has these columns; what is wrong with one is said in a line that names file, row and column, before anything is asked.

image: a picture's path relative to the file (in a data set: or its bytes), or a list of them; none where prompts alone will
    do (`sift`), as for text models.
question: a text, or a list of texts, the turns of a conversation about the pictures.
answers (or answer): what counts as right, a text or a number or a list of them; of several turns a list with one such for
    each; for the metrics ``point`` and ``box`` a box ``x0 y0 x1 y1``, as text or as four numbers.
metric, optional: a name that `foveate.tasks.metrics.metric` knows, for this row.
evidence, optional: a list of boxes ``[x0, y0, x1, y1]`` in pixels of the first picture, or a list of such lists, one for
    each picture; what shows the answer. An empty list: nothing does, as for "no".
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import sha256
from itertools import islice
from math import ceil, floor, isfinite
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from foveate.core.errors import FoveateError

from .metrics import BOXED, as_box
from .metrics import metric as metric_of
from .pictures import Lazy, Source, read_picture
from .question import Question, Turn
from .rows import Row, rows_of

METRIC, MAX_NEW_TOKENS = "exact", 16
"""Of rows that name no metric, and of answers, unless something else is said."""

_MASK_SOURCE = tuple[tuple[int, int], tuple[tuple[float, ...], ...]]


def read(
    path: str | Path, metric: str = METRIC, n: int | None = None, max_new_tokens: int = MAX_NEW_TOKENS
) -> list[Question]:
    """The first ``n`` questions of a data file, all if None; the task is called like the file.

    Every picture is opened once to see that it can be, and then again each time that it is looked at.
    """
    return sift(path, lambda pictures: None, metric, n, max_new_tokens)[0]


def sift(
    path: str | Path,
    refusal: Callable[[Sequence[Image.Image]], str | None],
    metric: str = METRIC,
    n: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    text: bool = False,
) -> tuple[list[Question], list[str]]:
    """As `read`, without the questions about pictures that ``refusal`` has a reason against; and a line about each of them.

    Left out ones are no part of the first ``n``. ``text``: whether there may be questions without a picture.
    """
    metric_of(metric)
    path = Path(path)
    asked: list[Question] = []
    left_out: list[str] = []
    tried: set[str] = set()
    for place, row in rows_of(path):
        try:
            question = _question(row, path, metric, max_new_tokens, text)
            if question.metric not in tried:
                # One of the user's own that fails is to fail now, and not once the model has answered.
                question.score([turn.answers[0] for turn in question.turns])
                tried.add(question.metric)
        except FoveateError as error:
            raise FoveateError(f"data={str(path)!r}: {place}: {error}") from error
        reason = refusal(question.images)
        if reason is None:
            asked.append(question)
        else:
            left_out.append(f"data={str(path)!r}: {place}: {reason}")
        if len(asked) == n:
            break
    if not asked and left_out:
        raise FoveateError(left_out[0])
    if not asked:
        raise FoveateError(f"data={str(path)!r}: holds no questions; must have a row for each")
    return asked, left_out


def unanswered(row: Row, path: str | Path, max_new_tokens: int = MAX_NEW_TOKENS) -> Question:
    """The question of one row whose right answers nobody has to know: without any, and no picture is opened yet.

    ``max_new_tokens`` is for rows without a column of that name.
    """
    longest = row.get("max_new_tokens")
    longest = max_new_tokens if longest is None else longest
    # Tables have texts for numbers.
    longest = int(longest) if isinstance(longest, str) and longest.isascii() and longest.isdigit() else longest
    if not _is_number(longest) or longest % 1 or longest < 1:
        raise FoveateError(f"max_new_tokens={longest!r}: must be a whole number from 1 on")
    turns = tuple(Turn(prompt, ()) for prompt in _prompts(row))
    pictures = Lazy(read_picture, _sources(row, Path(path)))
    return Question(Path(path).absolute().stem, pictures, turns, max_new_tokens=int(longest))


def digest(path: str | Path, n: int | None = None) -> str:
    """What tells data sets apart: SHA-256 of the first ``n`` rows and of their pictures' files, if they have any."""
    seen = sha256()
    for _, row in islice(rows_of(Path(path)), n):
        seen.update(json.dumps({**row, "image": None}, sort_keys=True, default=str).encode())
        for source in _sources(row, Path(path)) if row.get("image") else ():
            seen.update(source if isinstance(source, bytes) else source.read_bytes())
    return seen.hexdigest()


def divide(asked: Sequence[Question], share: float, seed: int) -> tuple[list[Question], list[Question]]:
    """Two parts of what `sift` gave that have no first picture in common, the first with about a ``share`` of the pictures.

    Which picture goes where, and the order, depend on its file and the seed alone: rows may be added later. Where there is
    none, a prompt is what a picture is elsewhere.
    """
    marked = sorted(((_mark(each, seed), each) for each in asked), key=lambda pair: pair[0])
    return [each for mark, each in marked if mark < share], [each for mark, each in marked if mark >= share]


def _mark(asked: Question, seed: int) -> float:
    """A number in [0, 1) by the file of the first picture, or by the first prompt."""
    assert isinstance(asked.images, Lazy)
    source = asked.images.sources[0] if asked.images.sources else asked.prompt.encode()
    seen = sha256(f"{seed}:".encode() + (source if isinstance(source, bytes) else source.read_bytes()))
    return int.from_bytes(seen.digest()[:6], "big") / 2**48


def _question(row: Row, path: Path, metric: str, max_new_tokens: int, text: bool) -> Question:
    metric = str(row.get("metric") or metric)
    metric_of(metric)
    sources = () if text and not row.get("image") else _sources(row, path)
    sizes = [read_picture(source).size for source in sources]
    evidence = _evidence(row.get("evidence"), sizes)
    prompts, answers = _turns(row, metric)
    turns = tuple(Turn(prompt, each, evidence) for prompt, each in zip(prompts, answers, strict=True))
    return Question(path.absolute().stem, Lazy(read_picture, sources), turns, metric, max_new_tokens)


def _column(row: Row, *names: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    raise FoveateError(f"column {names[0]!r} is missing or empty; the columns are {', '.join(row) or 'none'}")


def _sources(row: Row, path: Path) -> tuple[Source, ...]:
    found = _column(row, "image")
    found = found if isinstance(found, list) else [found]
    if not found:
        raise FoveateError("column 'image' is empty; must name one picture or more")
    return tuple(_source(each, path) for each in found)


def _source(found: Any, path: Path) -> Source:
    # Data sets hold pictures as bytes, a path, or both.
    if isinstance(found, dict):
        found = found.get("bytes") or found.get("path")
    if isinstance(found, bytes):
        return found
    if isinstance(found, str):
        return (path if path.is_dir() else path.parent) / found
    raise FoveateError(f"image={found!r}: must be a path or a picture's bytes, or a list of them")


def _turns(row: Row, metric: str) -> tuple[list[str], list[tuple[str, ...]]]:
    """The prompt and the answers of each turn."""
    asked, right = _prompts(row), _column(row, "answers", "answer")
    if isinstance(row["question"], str):
        right = [right]
    if not (isinstance(right, list) and len(right) == len(asked)):
        raise FoveateError(f"answers={right!r}: must be a list with one entry for each of the {len(asked)} questions")
    return asked, [_answers(each, metric) for each in right]


def _prompts(row: Row) -> list[str]:
    """The prompt of each turn."""
    asked = _column(row, "question")
    asked = [asked] if isinstance(asked, str) else asked
    if not (isinstance(asked, list) and asked and all(isinstance(prompt, str) for prompt in asked)):
        raise FoveateError(f"question={asked!r}: must be a text, or a list of texts for several turns")
    return asked


def _answers(found: Any, metric: str) -> tuple[str, ...]:
    several = isinstance(found, list) and not (metric in BOXED and _is_box(found))
    answers = tuple(_text(each, metric) for each in (found if several else [found]))
    if not answers:
        raise FoveateError("answers=[]: must have one or more")
    if metric in BOXED:
        for answer in answers:
            as_box(answer)
    return answers


def _text(answer: Any, metric: str) -> str:
    if metric in BOXED and _is_box(answer):
        return " ".join(map(str, answer))
    if isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise FoveateError(f"answers={answer!r}: must be a text or a number, or a list of them")
    # Parquet has columns of floats for whole numbers, too.
    return str(int(answer)) if isinstance(answer, float) and answer.is_integer() else str(answer)


def _evidence(found: Any, sizes: Sequence[tuple[int, int]]) -> Sequence[np.ndarray]:
    """A mask for each picture, from boxes; ``()`` where nobody knows."""
    if found is None:
        return ()
    if not isinstance(found, list) or not all(isinstance(each, list) for each in found):
        raise FoveateError(f"evidence={found!r}: must be a list of boxes [x0, y0, x1, y1]")
    if all(map(_is_box, found)):
        found = [found, *([] for _ in sizes[1:])]
    if len(found) != len(sizes):
        raise FoveateError(f"evidence: has boxes for {len(found)} pictures, and there are {len(sizes)}")
    for boxes, (width, height) in zip(found, sizes):
        for box in boxes:
            if not (_is_box(box) and max(0, box[0]) < min(width, box[2]) and max(0, box[1]) < min(height, box[3])):
                raise FoveateError(f"evidence={box!r}: must be [x0, y0, x1, y1] in a picture of {width} x {height} pixels")
    return Lazy(_mask, tuple((size, tuple(map(tuple, boxes))) for size, boxes in zip(sizes, found)))


def _is_box(found: Any) -> bool:
    return isinstance(found, list) and len(found) == 4 and all(_is_number(each) for each in found)


def _is_number(found: Any) -> bool:
    return isinstance(found, int | float) and not isinstance(found, bool) and isfinite(found)


def _mask(source: _MASK_SOURCE) -> np.ndarray:
    """Bool ``[H, W]``: every pixel that a box touches."""
    (width, height), boxes = source
    mask = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        mask[max(0, floor(y0)) : ceil(y1), max(0, floor(x0)) : ceil(x1)] = True
    return mask
