"""What is imported when: nothing slow before something asks for it, and typos are errors all the same."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
from mypy import api as mypy

import foveate
from foveate import cli
from foveate.cli.app import app

SLOW = {"torch", "transformers", "matplotlib", "numpy", "huggingface_hub"}
SHOW_IMPORTED = """
import sys, atexit
atexit.register(lambda: print(" ".join(sys.modules), file=sys.stderr))
"""


def commands(command: Any, *path: str) -> Iterator[tuple[str, ...]]:
    """Every command and group of commands, as a user types it."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, *path, name)


def imported(code: str, *arguments: str, code_of_exit: int = 0) -> set[str]:
    """The names of all modules that a process has imported by its end."""
    done = subprocess.run([sys.executable, "-c", SHOW_IMPORTED + code, *arguments], capture_output=True, text=True)

    assert done.returncode == code_of_exit, done.stderr
    return set(done.stderr.splitlines()[-1].split())


RUN = "from foveate.cli import main; main()"


def test_the_package_is_imported_at_once() -> None:
    assert not imported("import foveate; dir(foveate)") & SLOW


def test_no_help_waits_for_the_engine() -> None:
    """All of them one after the other, in one process."""
    every = [[*path, "--help"] for path in commands(typer.main.get_command(app))]
    code = f"from foveate.cli.app import app\nfor each in {every!r}:\n    app(each, standalone_mode=False)"

    assert len(every) > 10
    assert not imported(code) & SLOW


@pytest.mark.parametrize(
    ("arguments", "code_of_exit"), [(["--version"], 0), ([], 0), (["benhc"], 2), (["bench", "--keeep", "0.2"], 2)]
)
def test_neither_do_the_version_and_typos(arguments: list[str], code_of_exit: int) -> None:
    assert not imported(RUN, *arguments, code_of_exit=code_of_exit) & SLOW


def test_the_package_is_a_command() -> None:
    done = subprocess.run([sys.executable, "-m", "foveate", "--help"], capture_output=True, text=True)

    assert done.stdout.startswith("Usage: foveate ")


def test_the_shell_completes_commands() -> None:
    asked = {"_FOVEATE_COMPLETE": "complete_bash", "COMP_WORDS": "foveate be", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "foveate"], capture_output=True, text=True, env=os.environ | asked)

    assert done.stdout.split() == ["bench"]


def test_without_its_extra_the_command_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "NEEDS", ("typer", "absent"))

    with pytest.raises(SystemExit) as stopped:
        cli.main()

    assert stopped.value.code == 2
    assert capsys.readouterr() == ("", "foveate: the command line needs absent; pip install 'foveate[cli]'\n")


def test_everything_that_is_listed_is_there() -> None:
    assert dir(foveate) == sorted(foveate.__all__)
    assert all(getattr(foveate, name) is not None for name in foveate.__all__)


def test_type_checkers_see_what_is_listed() -> None:
    tree = ast.parse(Path(foveate.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    seen = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    seen += [node.target.id for node in block.body if isinstance(node, ast.AnnAssign)]

    assert sorted(seen) == sorted(foveate.__all__)


def test_typos_of_attributes_are_errors(tmp_path: Path) -> None:
    with pytest.raises(AttributeError, match="no attribute 'atach'"):
        _ = foveate.atach

    config = [f"[mypy]\nmypy_path = {Path(foveate.__file__).parents[1]}"]
    config += ["[mypy-foveate.*]\nfollow_imports = skip", "[mypy-foveate]\nfollow_imports = normal"]
    (tmp_path / "mypy.ini").write_text("\n".join(config))
    (tmp_path / "typo.py").write_text("import foveate\nfoveate.attach\nfoveate.reference\nfoveate.atach\n")
    report, trouble, code = mypy.run(
        ["--config-file", str(tmp_path / "mypy.ini"), "--cache-dir", str(tmp_path), str(tmp_path / "typo.py")]
    )

    assert (code, trouble) == (1, "")
    assert 'typo.py:4: error: Module has no attribute "atach"' in report
    assert "Found 1 error" in report
