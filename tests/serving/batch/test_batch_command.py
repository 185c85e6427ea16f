"""``foveate batch`` on the command line, up to where Ray begins."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.serving.batch.conftest import Write, lines
from typer.testing import CliRunner, Result

import foveate.cli.batch as command
from foveate.cli.app import app
from foveate.serving.answered import Answered
from foveate.serving.asked import read
from foveate.serving.batch import Crewed, Watcher, Work
from foveate.serving.ledger import Ledger

Call = Callable[..., Result]


@pytest.fixture
def call(write: Write, tmp_path: Path) -> Call:
    """Runs the command on three rows."""
    data = write([{"id": number} for number in range(3)])

    def called(*options: Any, data: Path = data, out: str = "out.jsonl") -> Result:
        return CliRunner().invoke(app, ["batch", str(data), str(tmp_path / out), *map(str, options)])

    return called


def some(
    work: Work, crewed: Crewed, ledger: Ledger, watcher: Watcher, *, n: int, failing: tuple[int, ...] = (), seen: list[Any]
) -> None:
    """Stands for the crew: gives the first ``n`` rows a line, and is interrupted if there are more."""
    seen.append((work, crewed))
    watcher.began(1, len(ledger.done), work.rows)
    for row in list(read(work.data, work.max_new_tokens))[:n]:
        answered = Answered(row.id, error="bad") if row.id in failing else Answered(row.id, "yes", 4, 2, 0.5)
        if ledger.append(answered.to_json()):
            watcher.answered(answered)
    if n < work.rows:
        raise KeyboardInterrupt


def test_an_interrupted_run_says_how_to_go_on_and_goes_on(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, seen = tmp_path / "out.jsonl", list[Any]()
    monkeypatch.setattr(command, "answer_all", partial(some, n=2, seen=seen))
    cut = call("--recipe", "hiprune(keep=36)", "--batch-size", 4)

    assert cut.exit_code == 130
    assert f"foveate: interrupted; 2 of 3 lines are in {out}, the same command goes on\n" in cut.stderr

    monkeypatch.setattr(command, "answer_all", partial(some, n=3, seen=seen))
    done = call("--recipe", "hiprune(keep=36)")

    assert (done.exit_code, done.stdout) == (0, f"{out}: 3 answers\n")
    assert [line["id"] for line in lines(out)] == [0, 1, 2]
    assert seen[0][1] == Crewed("local", "cpu", None, 4)
    assert seen[1][0].load.__self__.recipe == "hiprune(keep=36)"

    # All is there: nobody needs a Ray.
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "ray", None)
    again = call("--recipe", "hiprune(keep=36)")
    assert (again.exit_code, again.stdout) == (0, f"{out}: 3 answers\n")

    other = call("--recipe", "hiprune(keep=30)")
    assert other.exit_code == 2
    assert other.stderr.startswith(f"foveate: recipe='hiprune(keep=30)': {str(out)!r} holds answers with recipe='hiprune(")


def test_failures_are_said_and_can_be_tried_again(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = tmp_path / "out.jsonl", list[Any]()
    monkeypatch.setattr(command, "answer_all", partial(some, n=3, failing=(1,), seen=seen))
    failed = call()

    assert (failed.exit_code, failed.stdout) == (1, f"{out}: 2 answers, and 1 that say what failed\n")
    assert "failed: 1: bad\n" in failed.stderr
    assert lines(out)[1] == {"id": 1, "error": "bad"}

    monkeypatch.setattr(command, "answer_all", partial(some, n=3, seen=seen))
    assert call().exit_code == 1
    done = call("--retry-failed")
    assert (done.exit_code, done.stdout) == (0, f"{out}: 3 answers\n")
    assert [line["id"] for line in lines(out)] == [0, 2, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--recipe", "hirpune(keep=3)"], "unknown method 'hirpune'"),
        (["--keep", "3"], "keep='3': is for --server; with --model the recipe says it"),
        (["--server", "http://127.0.0.1:1"], "server='http://127.0.0.1:1': nobody answers"),
        (["--server", "here"], "server='here': must be an address such as http://localhost:8000"),
        (["--server", "http://127.0.0.1:1", "--recipe", "none"], "recipe='none': is the server's own affair"),
        (["--server", "http://127.0.0.1:1", "--artifacts", "x"], "artifacts='x': is the server's own affair"),
        (["--address", "127.0.0.1:1"], "address='127.0.0.1:1': cannot be had"),
        (["--device", "tpu"], "device='tpu': is not available here"),
    ],
)
def test_what_cannot_be_is_refused_and_leaves_nothing(call: Call, tmp_path: Path, options: list[str], said: str) -> None:
    result = call(*options)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(f"foveate: {said}")
    assert not list(tmp_path.glob("out*"))


def test_the_questions_are_not_overwritten(call: Call, tmp_path: Path) -> None:
    before = (tmp_path / "in.jsonl").read_text()
    result = call(out="in.jsonl")

    assert (result.exit_code, (tmp_path / "in.jsonl").read_text()) == (2, before)
    assert result.stderr.endswith("is the file of the questions; name another file\n")


def test_without_ray_the_extra_is_named(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "foveate.bench.crew", raising=False)
    result = call()

    assert (result.exit_code, result.stderr) == (2, "foveate: ray: is not installed; pip install 'foveate[ray]'\n")
