"""Checkpoint folders that are made on first use, in the user's cache: whole or not at all, and checked by digest."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import cache
from hashlib import file_digest
from pathlib import Path

from foveate.core.errors import FoveateError
from foveate.core.files import make_writable, write_json
from foveate.core.text import first_line

_DIGESTS = "digests.json"
_LOG = logging.getLogger(__name__)


def unpacked(model: str, folder: str, write: Callable[[Path], None]) -> Path:
    """A folder of the cache, which ``write`` fills beside its place if it is not there, while other processes wait.

    Raises:
        FoveateError: if the cache cannot be written, or if what is there is not what was written.
    """
    place = _cache() / folder
    if not place.is_dir():
        _make(model, place, write)
    _check(model, place)
    return place


def digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as content:
        return file_digest(content, "sha256").hexdigest()


def digests(folder: Path) -> dict[str, str]:
    """Of all files in a folder, by their names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): digest(file) for file in files}


def _cache() -> Path:
    """The user's, as the XDG specification has it: a relative path counts as none."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (given if given.is_absolute() else Path.home() / ".cache") / "foveate"


def _make(model: str, place: Path, write: Callable[[Path], None]) -> None:
    from filelock import FileLock

    make_writable(place.parent, "XDG_CACHE_HOME")
    with FileLock(place.with_name(f".{place.name}.lock")):
        if place.is_dir():  # another process was first
            return
        beside = place.with_name(f".{place.name}")
        # Of a process that died.
        shutil.rmtree(beside, ignore_errors=True)
        try:
            _LOG.info("%s: unpacking to %s, once", model, place)
            write(beside)
            write_json(beside / _DIGESTS, digests(beside))
            beside.rename(place)
        except OSError as error:
            raise FoveateError(
                f"XDG_CACHE_HOME={str(place.parent.parent)!r}: cannot be written ({first_line(error)}); name a folder with "
                "600 MB to spare"
            ) from error
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@cache
def _check(model: str, place: Path) -> None:
    """Compare all that was written with its digest; once in a process.

    Raises:
        FoveateError: with the remedy.
    """
    try:
        known = json.loads((place / _DIGESTS).read_text())
        wrong = next((name for name, wanted in known.items() if digest(place / name) != wanted), None)
    except (OSError, ValueError) as error:
        wrong = f"{_DIGESTS} ({first_line(error)})"
    if wrong:
        raise FoveateError(f"model={model!r}: {place / wrong} is damaged; delete the folder, and it is made again")
