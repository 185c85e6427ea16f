"""Benches that are cut short, and benches on Ray: what is finished is kept, and all come to the same."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tests.bench.interrupting import hear

FOVEATE = [sys.executable, "-c", "from foveate.cli import main; main()"]
TIMES = ("seconds", "speedup", "efficiency", "pairs")
"""What is in the names of numbers that a clock made."""
CELLS = 12
"""Of the bench below: two tasks under six methods at one budget."""

needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")


def command(tiny: Path, out: Path, *options: str) -> list[str]:
    fixed = {"--model": tiny, "--tasks": "shape,reading", "--n": 40, "--batch-size": 1, "--keep": 0.25, "--out": out}
    return [
        *FOVEATE,
        "bench",
        *(str(part) for option in fixed.items() for part in option),
        "--methods",
        "hiprune,fastv",
        *options,
    ]


def contents(out: Path) -> dict[str, Any]:
    """All that a bench measured, but not how long it took."""
    files = {path.name: json.loads(path.read_text()) for path in [out / "results.json", *(out / "cells").iterdir()]}
    return {name: _timeless(content) for name, content in files.items()}


def _timeless(content: Any) -> Any:
    if isinstance(content, list):
        return [_timeless(each) for each in content]
    if not isinstance(content, dict):
        return content
    return {name: value for name, value in content.items() if not any(time in name for time in TIMES)}


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What an undisturbed bench measures."""
    out = tmp_path_factory.mktemp("whole") / "out"
    subprocess.run(command(tiny, out), check=True, capture_output=True)
    return contents(out)


def cut_short(command: list[str], out: Path, number: int, *, cells: int = 3) -> tuple[int, str]:
    """Run a command, send it a signal once so many cells are finished; its exit code and what it said last."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    while not (out / "results.json").is_file() or len(json.loads((out / "results.json").read_text())) < cells:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, said = process.communicate()
    return process.returncode, said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("ray", [(), pytest.param(("--ray", "--workers", "2"), marks=needs_ray)], ids=["alone", "ray"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_bench_keeps_what_is_finished_and_goes_on_to_the_same_end(
    tiny: Path, tmp_path: Path, whole: dict[str, Any], ray: tuple[str, ...], number: signal.Signals
) -> None:
    out = tmp_path / "out"

    code, said = cut_short(command(tiny, out, *ray), out, number)

    assert code == 130
    assert said == f"foveate: interrupted; the finished cells are in {out}, --resume goes on"
    assert resumed(tiny, out, *ray) == whole


@pytest.mark.slow
def test_a_killed_bench_goes_on_to_the_same_end(tiny: Path, tmp_path: Path, whole: dict[str, Any]) -> None:
    out = tmp_path / "out"
    code, _ = cut_short(command(tiny, out), out, signal.SIGKILL)
    # As if it had been killed in the middle of a write.
    (out / ".results.json.1").write_text('[{"model": ')

    assert code == -signal.SIGKILL
    assert resumed(tiny, out) == whole
    assert not (out / ".results.json.1").exists()


def resumed(tiny: Path, out: Path, *options: str) -> dict[str, Any]:
    """What is there when the rest has been measured, too, which must be less than all."""
    kept = len(json.loads((out / "results.json").read_text()))
    done = subprocess.run(command(tiny, out, "--resume", *options), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 3 <= kept < CELLS
    assert f"[{CELLS - kept}/{CELLS - kept}]" in done.stderr
    return contents(out)


def test_workers_without_ray_are_found_out(call: Any, tmp_path: Path) -> None:
    result = call("bench", "--workers", 2, "--out", tmp_path / "out")

    assert result.exit_code == 2
    assert result.stderr == "foveate: workers=2: is for --ray; give both\n"


@needs_ray
@pytest.mark.parametrize(
    ("options", "address"),
    [
        (["--ray"], "local"),
        (["--ray", "--n", "1"], "local"),
        (["--ray", "auto"], "auto"),
        (["--ray=a:1", "--n", "1"], "a:1"),
    ],
)
def test_ray_stands_alone_or_with_an_address(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], address: str
) -> None:
    from foveate.bench import parallel

    asked = []

    def connected(address: str) -> None:
        asked.append(address)
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "connected", connected)
    result = call("bench", "--model", tiny, "--out", tmp_path / "out", *options)

    assert (result.exit_code, asked) == (130, [address])


def test_a_missing_ray_is_named_with_the_remedy(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("crew", "parallel"):
        monkeypatch.delitem(sys.modules, f"foveate.bench.{name}", raising=False)
    result = call("bench", "--model", tiny, "--out", tmp_path / "out", "--ray")

    assert result.exit_code == 2
    assert result.stderr == "foveate: ray: is not installed; pip install 'foveate[ray]'\n"
