"""The folder of one bench: what is finished stays finished.

``settings.json`` says under which settings and on which machine, ``results.json`` holds the records, ``cells/`` what each
was made from with the answer to every question, ``examples/`` the pictures of the first questions, ``failures.json`` the
cells that failed. Every file is replaced as a whole, so neither a reader nor a run that is killed ever meets half a file.
"""

from __future__ import annotations

import json
import platform
import re
from base64 import b64decode
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from foveate.bench.cells import Cell, Key
from foveate.bench.examples import Picture
from foveate.bench.machine import machine
from foveate.bench.records import Answer, Failure, Measurement, Record
from foveate.core.errors import FoveateError
from foveate.core.files import make_writable, write_json, write_whole
from foveate.core.recipe import NONE

TIMED = 3


@dataclass(frozen=True)
class Settings:
    """What every cell of a folder has in common; cells under other settings could not be compared with them.

    timed: batches of a cell on which the unmodified model and the physical limit are timed as well.
    data: the file of the user's own questions, with its digest (`foveate.tasks.files.digest`) and the longest answer; None
        where the tasks are generated.
    metric: of rows of the data that name none; of generated tasks, instead of their own, None for that.
    artifacts: folder of calibrated numbers besides the model's own.
    model_args: keywords with which the model is loaded, as `foveate.checkpoint.arguments.as_text` writes them.
    system: what every conversation begins with.
    short: whether generated tasks ask for a short answer (`foveate.bench.questions.Wording`).
    films: whether methods meet the frames of a video as one video (`foveate.engine.Session.films`), not as pictures.
    """

    model: str
    n: int
    seed: int
    device: str
    dtype: str
    batch_size: int
    companion: str | None = None
    timed: int = TIMED
    data: str | None = None
    digest: str | None = None
    metric: str | None = None
    max_new_tokens: int | None = None
    artifacts: str | None = None
    model_args: str | None = None
    system: str | None = None
    short: bool = False
    films: bool = False


class Results:
    """The results of one bench on disk, to read; ``records`` are the finished cells in the order of the plan."""

    def __init__(self, path: Path, settings: Settings) -> None:
        self.path = path
        self.settings = settings
        self.records = self._read_records()

    @staticmethod
    def open(path: Path) -> Results:
        """The results that a bench left in a folder."""
        found = _read_json(path / "settings.json") if (path / "settings.json").is_file() else {}
        try:
            settings = Settings(**{each.name: found[each.name] for each in fields(Settings) if each.name in found})
        except TypeError as error:
            raise FoveateError(f"folder={str(path)!r}: holds no results of a bench") from error
        return Results(path, settings)

    def record(self, key: Key) -> Record | None:
        """The record of a finished cell."""
        return next((record for record in self.records if record.key == key), None)

    def answers(self, record: Record) -> list[Answer]:
        """Every question of a finished cell as it was answered."""
        return [Answer(**answer) for answer in self.details(record)["answers"]]

    def scores(self, record: Record) -> list[float]:
        """The score of each question of a finished cell."""
        return [answer.score for answer in self.answers(record)]

    def pairs(self, record: Record) -> dict[str, list[float]]:
        """The paired ratios of a finished cell, one for each timed batch, by the name that they have in the record."""
        pairs: dict[str, list[float]] = self.details(record)["pairs"]
        return pairs

    def details(self, record: Record) -> dict[str, Any]:
        """What a finished cell was made from: a `Measurement` as JSON."""
        details: dict[str, Any] = _read_json(self._details_path(record.key))
        return details

    def document(self, name: str) -> Any:
        """The content of another JSON file in the folder; None where there is none."""
        path = self.path / name
        return _read_json(path) if path.is_file() else None

    def _details_path(self, key: Key) -> Path:
        task, method, keep = key
        return self.path / "cells" / f"{_file_name(task)}.{_file_name(method)}.{keep or 'all'}.json"

    def _read_records(self) -> list[Record]:
        path = self.path / "results.json"
        entries = _read_json(path) if path.is_file() else []
        promised = {each.name for each in fields(Record)}
        if not isinstance(entries, list) or any(not isinstance(each, dict) or each.keys() != promised for each in entries):
            raise FoveateError(
                f"out={str(self.path)!r}: results.json holds other records than this version's; name another folder, or "
                f"read it with the version in its settings.json"
            )
        return [Record(**entry) for entry in entries]


class ResultFolder(Results):
    """The results of one bench while they are made."""

    def __init__(self, path: Path, settings: Settings, *, resume: bool = False) -> None:
        """Make or open the folder; refuse results that are in the way or that do not belong to ``settings``."""
        self._lock = claim(path, asdict(settings), "bench", resume=resume)
        super().__init__(path, settings)
        self.failures: list[Failure] = []
        self._places: dict[Key, int] = {}

    def begin(self, plan: Sequence[Cell] = ()) -> None:
        """Write down settings, versions and machine, and forget the failures of an earlier run.

        Records and failures will stand in the order of ``plan``, in whatever order the cells are finished.
        """
        self._places = {cell.key: place for place, cell in enumerate(plan)}
        # The settings first: without them, a folder with anything in it is not ours.
        write_json(self.path / "settings.json", {**asdict(self.settings), **provenance()})
        (self.path / "cells").mkdir(exist_ok=True)
        (self.path / "examples").mkdir(exist_ok=True)
        (self.path / "failures.json").unlink(missing_ok=True)
        for torn in self.path.rglob(".*.*.[0-9]*"):
            torn.unlink(missing_ok=True)

    def finished(self, cell: Cell) -> bool:
        """Whether the folder holds the cell's record."""
        return self.record(cell.key) is not None

    def keep(self, record: Record, measurement: Measurement) -> None:
        """Keep a finished cell; retention is filled in, in every record, as soon as it is known."""
        # The details first: a record in results.json is the promise that they are there.
        named = {"task": record.task, "method": record.method, "keep": record.keep}
        examples = [[self._unpacked(picture) for picture in pictures] for pictures in measurement.examples]
        write_json(self._details_path(record.key), {**named, **asdict(replace(measurement, examples=examples))})
        self.records = with_retention(self._with(record))
        write_json(self.path / "results.json", [asdict(record) for record in self.records])

    def report(self, failure: Failure) -> None:
        """Keep what a failed cell left behind."""
        self.failures = sorted([*self.failures, failure], key=lambda each: self._place(each.cell.key))
        write_json(self.path / "failures.json", [failure.to_json() for failure in self.failures])

    def _with(self, record: Record) -> list[Record]:
        """The records and a new one, which comes before the first that the plan has later."""
        place = self._place(record.key)
        later = (number for number, other in enumerate(self.records) if self._place(other.key) > place)
        at = next(later, len(self.records))
        return [*self.records[:at], record, *self.records[at:]]

    def _place(self, key: Key) -> int:
        """Place in the plan; what is of another plan stays where it is."""
        return self._places.get(key, -1)

    def _unpacked(self, picture: Picture) -> Picture:
        """The picture as the name of a file in ``examples/``; the cells of a task share it."""
        content = b64decode(picture.png)
        name = f"{sha256(content).hexdigest()[:16]}.png"
        if not (self.path / "examples" / name).is_file():
            write_whole(self.path / "examples" / name, content)
        return replace(picture, png=name)


def claim(path: Path, settings: Mapping[str, Any], kind: str, *, resume: bool) -> BaseFileLock:
    """Make or open the folder of a run; refuse results that are in the way or that do not belong to ``settings``.

    ``kind`` is what makes such a folder, in a word. As long as what this returns lives, no other process gets the folder.
    """
    make_writable(path)
    # What is hidden is a lock, or was left half written by a run that was killed.
    if any(not entry.name.startswith(".") for entry in path.iterdir()):
        _refuse_other(path, settings, kind, resume=resume)
    # One process may open its own folder again.
    lock = FileLock(path / ".lock", is_singleton=True)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise FoveateError(f"out={str(path)!r}: another run works in it; wait, or name another folder") from None
    return lock


def _refuse_other(path: Path, settings: Mapping[str, Any], kind: str, *, resume: bool) -> None:
    if not resume:
        raise FoveateError(f"out={str(path)!r}: is not empty; --resume continues there, or name another folder")
    if not (path / "settings.json").is_file():
        raise FoveateError(f"out={str(path)!r}: holds no results of a {kind}; name another folder")
    found = _read_json(path / "settings.json")
    for name, wanted in settings.items():
        # What an earlier version did not know of was as it is where nobody asks for it.
        if found.get(name) != wanted and (name in found or wanted):
            raise FoveateError(
                f"{name}={wanted!r}: {str(path)!r} holds results with {name}={found.get(name)!r}, "
                f"which cannot be mixed; resume with that, or name another folder"
            )


def with_retention(records: Sequence[Record]) -> list[Record]:
    """The records with their score over that of the unmodified model on the same task, where that is known and not 0."""
    unmodified = {record.task: record.score for record in records if record.method == NONE}
    return [
        replace(record, retention=record.score / base if (base := unmodified.get(record.task)) else None)
        for record in records
    ]


def _file_name(text: str) -> str:
    """A task or recipe without the characters that file systems do not take; a digest keeps two that look alike apart."""
    name = re.sub(r"[^\w.-]+", "-", text).strip("-")[:60]
    return name if name == text else f"{name}-{sha256(text.encode()).hexdigest()[:8]}"


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise FoveateError(f"out={str(path.parent)!r}: {path.name} cannot be read ({error}); name another folder") from error


def provenance(*packages: str) -> dict[str, Any]:
    """Versions of Python, of what every result depends on and of ``packages``, and the machine."""
    named = ("foveate", "torch", "transformers", *packages)
    return {
        "versions": {"python": platform.python_version()} | {package: version(package) for package in named},
        "machine": machine(),
    }
