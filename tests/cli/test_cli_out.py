"""``--out`` of every command that has one: what cannot be written is refused in one line, before the work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

COMMANDS = {
    "bench": ("--tasks", "shape", "--n", 2),
    "tune": ("--tasks", "shape", "--max-drop", 0.02, "--minutes", 0.01),
    "inspect": ("--task", "shape", "--recipe", "none"),
    "probe information-horizon": ("--tasks", "shape", "--n", 2),
    "probe embedlens": ("--tasks", "shape", "--n", 2),
}


@pytest.mark.parametrize("place", ["a file", "inside a file", "where nobody writes"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder_that_cannot_be_written_is_refused(call: Any, tmp_path: Path, command: str, place: str) -> None:
    file = tmp_path / "file.png"
    file.write_bytes(b"mine")
    out = {"a file": file, "inside a file": file / "out", "where nobody writes": Path("/proc/out")}[place]

    # That there is no such model is found when it is loaded.
    result = call(*command.split(), *COMMANDS[command], "--model", tmp_path / "none", "--out", out)

    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"foveate: out={str(out)!r}: cannot be written (")
    assert result.stderr.endswith("; name another folder\n")
    assert result.stderr.count("\n") == 1
    assert file.read_bytes() == b"mine"


def test_a_page_is_not_written_over_a_folder(call: Any, tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text(
        '{"model": "m", "n": 1, "seed": 0, "device": "cpu", "dtype": "float32", "batch_size": 1}'
    )

    result = call("report", tmp_path, "--out", tmp_path)

    assert result.exit_code == 2
    assert result.stderr == f"foveate: out={str(tmp_path)!r}: is a folder; name a file in it\n"
    assert [each.name for each in tmp_path.iterdir()] == ["settings.json"]
