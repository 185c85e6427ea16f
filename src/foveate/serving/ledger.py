"""The file of answers that `foveate batch` writes: one line for each id, whatever was killed meanwhile.

One process writes it, a whole line at a time at the end of the file, so nothing but the last line can be torn; a line is
there once it ends. What the lines have in common (recipe, model, input) lies beside, so that answers of different runs never
mix.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from foveate.core.errors import FoveateError
from foveate.core.files import check_writable, write_json

_BLOCK = 1 << 20


class Ledger:
    """Lines on disk, and the ids that have one; use as a context manager, in which no other process gets the file.

    Attributes:
        path: of the file.
        done: ids that have a line, as text.
        failures: how many of these lines say what an id failed of.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], retry: bool = False) -> None:
        """``settings``: what all lines have in common; ``retry``: forget the lines that say that an id failed."""
        self.path = path
        self.done: set[str] = set()
        self.failures = 0
        self._settings = dict(settings)
        self._retry = retry
        self._beside = path.with_name(f"{path.name}.settings.json")
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        self._file: BinaryIO | None = None

    def __enter__(self) -> Ledger:
        """See what is there; nothing is changed yet, unless a file of the same run has to be mended.

        Raises:
            FoveateError: if the file cannot be written, belongs to another run, or is at work.
        """
        check_writable(self.path)
        try:
            self._lock.acquire(blocking=False)
        except Timeout:
            raise FoveateError(f"out={str(self.path)!r}: another batch writes it; wait, or name another file") from None
        try:
            if self.path.exists() and self.path.stat().st_size:
                self._refuse_other()
                self._drop_torn_line()
                if self._retry:
                    self._drop_failures()
                self._read()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file is not None:
            self._file.close()
        self._lock.release()

    def append(self, line: Mapping[str, Any]) -> bool:
        """Write the line of an id, unless it has one; whether it was written. It is on its way to the disk on return."""
        if str(line["id"]) in self.done:
            return False
        try:
            if self._file is None:
                # The settings first: without them nobody knows what the lines are.
                write_json(self._beside, self._settings)
                self._file = self.path.open("ab", buffering=0)
            whole = memoryview(_as_json(line))
            while whole:
                whole = whole[self._file.write(whole) :]
        except OSError as error:
            raise FoveateError(
                f"out={str(self.path)!r}: cannot be written ({error.strerror}); the lines so far are there, and the same "
                "command goes on"
            ) from error
        self._count(line)
        return True

    def _count(self, line: Mapping[str, Any]) -> None:
        self.done.add(str(line["id"]))
        self.failures += "error" in line

    def _refuse_other(self) -> None:
        try:
            found = json.loads(self._beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            found = None
        if not isinstance(found, dict):
            raise FoveateError(
                f"out={str(self.path)!r}: is not empty and was written by no batch ({self._beside.name} is not beside it); "
                "name another file"
            )
        for name, wanted in self._settings.items():
            if found.get(name) != wanted:
                raise FoveateError(
                    f"{name}={wanted!r}: {str(self.path)!r} holds answers with {name}={found.get(name)!r}, which cannot be "
                    "mixed; go on with that, or name another file"
                )

    def _drop_torn_line(self) -> None:
        """Cut off what stands behind the last end of a line."""
        with self.path.open("r+b") as file:
            end = file.seek(0, 2)
            whole = end
            while whole:
                start = max(0, whole - _BLOCK)
                file.seek(start)
                found = file.read(whole - start).rfind(b"\n")
                if found >= 0:
                    whole = start + found + 1
                    break
                whole = start
            if whole < end:
                file.truncate(whole)

    def _drop_failures(self) -> None:
        """Replace the file by one without the failed lines, at once or not at all."""
        kept = self.path.with_name(f".{self.path.name}.kept")
        with kept.open("wb") as file:
            for _, text, line in self._lines():
                if "error" not in line:
                    file.write(text)
        kept.replace(self.path)

    def _read(self) -> None:
        for number, _, line in self._lines():
            if str(line["id"]) in self.done:
                raise FoveateError(
                    f"out={str(self.path)!r}: line {number}: is a second one for id {line['id']!r}; name another file"
                )
            self._count(line)

    def _lines(self) -> Iterator[tuple[int, bytes, dict[str, Any]]]:
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                except ValueError:
                    line = None
                if not (isinstance(line, dict) and "id" in line):
                    raise FoveateError(f"out={str(self.path)!r}: line {number}: was written by no batch; name another file")
                yield number, text, line


def _as_json(line: Mapping[str, Any]) -> bytes:
    """A line as it stands in the file."""
    try:
        return f"{json.dumps(line, ensure_ascii=False, allow_nan=False)}\n".encode()
    except UnicodeEncodeError:
        # Half of a character, as a cut answer may end in, is none in UTF-8.
        return f"{json.dumps(line, allow_nan=False)}\n".encode()
