"""A file of answers has one line for each id, wherever a process was killed, and never mixes runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.serving.batch.conftest import lines

from foveate.core.errors import FoveateError
from foveate.serving.ledger import Ledger

RUN = {"recipe": "none", "model": "reference"}
ANSWERS = [{"id": f"rön {number}", "answer": "grün" * number} for number in range(4)]


def written(path: Path) -> bytes:
    """What a run that was not disturbed leaves."""
    with Ledger(path, RUN) as ledger:
        for answer in ANSWERS:
            assert ledger.append(answer)
    return path.read_bytes()


def refusal(path: Path, run: dict[str, str] = RUN, *, retry: bool = False) -> str:
    before = path.read_bytes()
    with pytest.raises(FoveateError) as raised, Ledger(path, run, retry):
        pass
    assert path.read_bytes() == before
    return str(raised.value)


@given(st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_it_goes_on_wherever_it_was_cut(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "out.jsonl"
    path.unlink(missing_ok=True)
    whole = written(path)
    cut = data.draw(st.integers(0, len(whole)))
    path.write_bytes(whole[:cut])

    with Ledger(path, RUN) as ledger:
        kept = len(ledger.done)
        added = [ledger.append(answer) for answer in ANSWERS]

    assert kept == whole[:cut].count(b"\n")
    assert added == [False] * kept + [True] * (len(ANSWERS) - kept)
    assert path.read_bytes() == whole


def test_a_torn_line_may_be_longer_than_what_is_read_at_once(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    whole = written(path)
    path.write_bytes(whole + b'{"id": "' + b"x" * 3_000_000)

    with Ledger(path, RUN) as ledger:
        assert len(ledger.done) == 4

    assert path.read_bytes() == whole


def test_an_id_is_the_same_as_a_number_and_as_text(tmp_path: Path) -> None:
    with Ledger(tmp_path / "out.jsonl", RUN) as ledger:
        assert ledger.append({"id": 7, "answer": ""})
        assert not ledger.append({"id": "7", "answer": ""})


def test_failures_are_counted_and_dropped_when_they_are_to_be_tried_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path)
    with Ledger(path, RUN) as ledger:
        ledger.append({"id": "bad", "error": "no such file"})
        assert ledger.failures == 1
    with Ledger(path, RUN) as ledger:
        assert (ledger.failures, "bad" in ledger.done) == (1, True)

    with Ledger(path, RUN, retry=True) as ledger:
        assert (ledger.failures, "bad" in ledger.done) == (0, False)

    assert lines(path) == ANSWERS
    assert sorted(each.name for each in tmp_path.iterdir()) == [".out.jsonl.lock", "out.jsonl", "out.jsonl.settings.json"]


def test_half_a_character_is_written_so_that_it_can_be_read(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with Ledger(path, RUN) as ledger:
        ledger.append({"id": "a", "answer": "\ud83d"})

    assert lines(path) == [{"id": "a", "answer": "\ud83d"}]


def test_answers_of_another_run_are_refused_by_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path)

    assert refusal(path, {**RUN, "recipe": "hiprune(keep=36)"}) == (
        f"recipe='hiprune(keep=36)': {str(path)!r} holds answers with recipe='none', which cannot be mixed; go on with "
        "that, or name another file"
    )
    # A line that is torn is not cut off the file of somebody else.
    path.write_bytes(path.read_bytes() + b"{")
    assert "'reference'" in refusal(path, {**RUN, "model": "mine"})


def test_files_of_others_are_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("important notes")

    assert "is not empty and was written by no batch (out.jsonl.settings.json is not beside it)" in refusal(path)

    path.unlink()
    whole = written(path)
    path.write_bytes(whole + b"mine\n")
    assert "line 5: was written by no batch" in refusal(path)
    path.write_bytes(whole + whole)
    assert "line 5: is a second one for id 'rön 0'" in refusal(path)


def test_two_at_once_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path)
    with Ledger(path, RUN):
        assert "another batch writes it" in refusal(path)
    with Ledger(path, RUN) as ledger:
        assert len(ledger.done) == 4


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match="is a folder; name a file in it"), Ledger(tmp_path, RUN):
        pass
    with pytest.raises(FoveateError, match="cannot be written"), Ledger(tmp_path / "nowhere" / "out.jsonl", RUN):
        pass


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_full_disk_is_said_in_a_line(tmp_path: Path) -> None:
    with Ledger(tmp_path / "out.jsonl", RUN) as ledger, Path("/dev/full").open("ab", buffering=0) as full:
        ledger.append(ANSWERS[0])
        ledger._file.close()
        ledger._file = full

        with pytest.raises(FoveateError, match=r"cannot be written \(No space left on device\); the lines so far are there"):
            ledger.append(ANSWERS[1])
        assert ledger.done == {"rön 0"}
