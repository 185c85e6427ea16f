"""Writing files so that nobody ever meets half of one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from foveate.core.errors import FoveateError


def make_writable(folder: Path, parameter: str = "out") -> None:
    """Make a folder, and see that files can be written there.

    Raises:
        FoveateError: if they cannot; it names the ``parameter``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise FoveateError(
            f"{parameter}={str(folder)!r}: cannot be written ({error.strerror}); name another folder"
        ) from error


def write_whole(path: Path, content: bytes) -> None:
    """Replace ``path`` by ``content``, at once or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """The same for JSON; numbers that JSON does not know are refused."""
    write_whole(path, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
