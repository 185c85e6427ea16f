"""What `foveate batch` is to answer: rows as `foveate.tasks.files` reads them, each with an id of its own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError
from foveate.tasks.files import unanswered
from foveate.tasks.question import Question
from foveate.tasks.rows import Row, rows_of

ID = str | int


@dataclass(frozen=True, eq=False)
class Asked:
    """One row: its id, and the question, whose pictures are opened when they are looked at."""

    id: ID
    question: Question

    @property
    def key(self) -> str:
        """The id as text: 7 and "7" are the same."""
        return str(self.id)


@dataclass(frozen=True)
class Contents:
    """What tells a file of rows from others, and how many rows it has.

    Attributes:
        digest: SHA-256 of the rows (not of the pictures' files).
    """

    rows: int
    digest: str


def read(path: Path, max_new_tokens: int) -> Iterator[Asked]:
    """The rows, one after the other; as many are in memory as somebody holds.

    Raises:
        FoveateError: at the first row that has no id, or is no question; it names its place.
    """
    for place, row in rows_of(path):
        yield _asked(row, path, place, max_new_tokens)


def survey(path: Path, max_new_tokens: int) -> Contents:
    """Read a file once, and hold nothing but its ids.

    Raises:
        FoveateError: as `read`, or if two rows have the same id; it names both. Or if there are no rows.
    """
    seen, places = sha256(), dict[str, str]()
    for place, row in rows_of(path):
        key = _asked(row, path, place, max_new_tokens).key
        if key in places:
            raise FoveateError(f"data={str(path)!r}: {place}: id {key!r} is that of {places[key]}, too; give each its own")
        places[key] = place
        seen.update(json.dumps(row, sort_keys=True, default=_as_text).encode())
    if not places:
        raise FoveateError(f"data={str(path)!r}: holds no questions; must have a row for each")
    return Contents(len(places), seen.hexdigest())


def _as_text(found: Any) -> str:
    """What JSON does not know; pictures of a data set are bytes."""
    return sha256(found).hexdigest() if isinstance(found, bytes) else str(found)


def _asked(row: Row, path: Path, place: str, max_new_tokens: int) -> Asked:
    try:
        return Asked(_id(row), unanswered(row, path, max_new_tokens))
    except FoveateError as error:
        raise FoveateError(f"data={str(path)!r}: {place}: {error}") from error


def _id(row: Row) -> ID:
    found: Any = row.get("id")
    if found is None:
        raise FoveateError("column 'id' is missing or empty; give each row one of its own")
    if isinstance(found, bool) or not isinstance(found, str | int):
        raise FoveateError(f"id={found!r}: must be a text or a whole number")
    return found
