"""One line for each id, also when workers and the driver are killed: on one Ray that all tests share."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray")

import ray
from tests.bench.interrupting import Interrupting, hear, heard
from tests.serving.batch.conftest import Write, lines
from tests.serving.batch.deadly import SETTINGS, Silent, nothing, work
from tests.serving.batch.file import FOVEATE, ask_server, check, questions

from foveate.bench.crew import LIVES, connected
from foveate.core.errors import FoveateError
from foveate.serving.answered import Answered
from foveate.serving.batch import Crewed, Work, answer_on
from foveate.serving.door.rules import TRANSFORMERS, Rules
from foveate.serving.ledger import Ledger
from foveate.serving.settings import Settings

ROOT = Path(__file__).parents[3]
Nodes = list[dict[str, float]]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with connected("local") as found:
        yield found


@pytest.fixture
def address(nodes: Nodes) -> str:
    """Where other processes find the Ray."""
    return ray.get_runtime_context().gcs_address


@pytest.fixture
def marks(tmp_path: Path) -> Path:
    folder = tmp_path / "marks"
    folder.mkdir()
    return folder


class Log(Silent):
    """A watcher that remembers."""

    def __init__(self) -> None:
        self.ids: list[Any] = []

    def answered(self, answered: Answered) -> None:
        self.ids.append(answered.id)


def test_killed_workers_lose_nothing_and_poison_only_itself(nodes: Nodes, write: Write, tmp_path: Path, marks: Path) -> None:
    asked = {3: "kill once", 9: "kill always", 14: "raise"}
    data, out, log = write([{"id": n, "question": asked.get(n, "what?")} for n in range(20)]), tmp_path / "out.jsonl", Log()

    with Ledger(out, SETTINGS) as ledger:
        answer_on(nodes, work(data, marks), Crewed("local", "cpu", 2, 4), ledger, log)

    written = {line["id"]: line for line in lines(out)}
    assert len(lines(out)) == 20
    assert [line["id"] for line in lines(out)] == log.ids
    assert written.keys() == set(range(20))
    assert {number for number, line in written.items() if "error" in line} == {9, 14}
    assert written[9]["error"].startswith(f"ray: {LIVES} workers were lost over this row (")
    assert written[14]["error"] == "raise: has a bad day"
    assert written[3] == {"id": 3, "answer": "kill once", "tokens_before": 4, "tokens_after": 2, "seconds": 0.0}
    # In its block, and then alone.
    assert len(list(marks.glob("9-*"))) == 1 + LIVES


def test_a_killed_driver_is_started_again_and_asks_for_the_rest(
    address: str, write: Write, tmp_path: Path, marks: Path
) -> None:
    data, out = write([{"id": number} for number in range(40)]), tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "tests.serving.batch.deadly", *map(str, (data, out, marks, address))]
    driver = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not out.is_file() or out.read_bytes().count(b"\n") < 8:
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.01)
    driver.kill()
    driver.communicate()
    kept = lines(out)
    # As if it had been killed in the middle of a write.
    with out.open("a") as file:
        file.write('{"id": 39, "answ')

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    assert done.returncode == 0, done.stderr
    assert 8 <= len(kept) < 40
    assert lines(out)[: len(kept)] == kept
    assert sorted(line["id"] for line in lines(out)) == list(range(40))
    # What had its line was not asked again.
    assert all(len(list(marks.glob(f"{line['id']}-*"))) == 1 for line in kept)


def test_a_server_that_is_gone_ends_it(nodes: Nodes, write: Write, tmp_path: Path, marks: Path) -> None:
    data, out = write([{"id": 0}, *({"id": number, "question": "gone"} for number in range(1, 9))]), tmp_path / "out.jsonl"

    with Ledger(out, SETTINGS) as ledger, pytest.raises(FoveateError, match=r"6 of 9 lines are in .*--retry-failed also"):
        answer_on(nodes, work(data, marks), Crewed("local", "cpu", 1, 3), ledger, Silent())


class Dropping(Silent):
    """A watcher that is told Ctrl-C in a finaliser, as of the references of Ray that the driver drops."""

    def answered(self, answered: Answered) -> None:
        if answered.id == 3:
            Interrupting()


def test_an_interrupt_in_a_finaliser_is_not_lost(nodes: Nodes, write: Write, tmp_path: Path, marks: Path) -> None:
    data, out = write([{"id": n} for n in range(20)]), tmp_path / "out.jsonl"

    with heard(), Ledger(out, SETTINGS) as ledger:
        with pytest.raises(KeyboardInterrupt):
            answer_on(nodes, work(data, marks), Crewed("local", "cpu", 1, 4), ledger, Dropping())
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

    # The block that was there is written to its end.
    assert [line["id"] for line in lines(out)] == [0, 1, 2, 3]


@pytest.mark.slow
def test_what_cannot_be_loaded_leaves_nothing(nodes: Nodes, write: Write, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    nowhere = Work(write([{"id": 1}]), 1, 64, nothing)

    with Ledger(out, SETTINGS) as ledger, pytest.raises(FoveateError, match=r"^model='nowhere': cannot be loaded$"):
        answer_on(nodes, nowhere, Crewed("local", "cpu", 1, 1), ledger, Silent())

    assert [each.name for each in tmp_path.iterdir() if each.name.startswith("out")] == []


@pytest.mark.slow
def test_the_reference_model_answers_a_file(address: str, tmp_path: Path) -> None:
    """Interrupted once, on the command line."""
    data, right = questions(tmp_path, 40)
    out = tmp_path / "out.jsonl"
    options = ["--recipe", "hiprune(keep=36)", "--address", address, "--workers", "1", "--batch-size", "4"]
    command = [*FOVEATE, "batch", str(data), str(out), *options, "--max-new-tokens", "4"]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=hear)
    while not out.is_file() or not out.read_bytes().count(b"\n"):
        assert driver.poll() is None, driver.stderr.read()
        time.sleep(0.01)
    driver.send_signal(signal.SIGINT)
    _, said = driver.communicate()
    kept = len(lines(out))

    assert driver.returncode == 130, said
    assert said.splitlines()[-1] == f"foveate: interrupted; {kept} of 40 lines are in {out}, the same command goes on"
    assert kept < 40

    done = subprocess.run(command, capture_output=True, text=True)

    assert done.returncode == 1, done.stderr
    assert done.stdout == f"{out}: 38 answers, and 2 that say what failed\n"
    assert f"1 worker on Ray, {kept} of 40 lines are there" in done.stderr
    check(out, right, (144, 36))


@pytest.mark.slow
def test_a_server_on_transformers_answers_a_file(address: str, tmp_path: Path) -> None:
    pytest.importorskip("transformers.cli.serving.systemone")
    from tests.serving.door.fallback import Served

    server = Served(Rules(Settings("hiprune(keep=36)"), behind=TRANSFORMERS))
    try:
        ask_server(f"http://127.0.0.1:{server.port}", tmp_path, "--address", address)
    finally:
        server.close()
