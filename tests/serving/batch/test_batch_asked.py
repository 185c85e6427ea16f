"""Rows are seen once before anything is asked, and then read as somebody has time for them."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tests.serving.batch.conftest import Write

from foveate.core.errors import FoveateError
from foveate.serving.asked import Asked, read, survey
from foveate.serving.batch import Blocks


def test_rows_are_those_of_the_data_format_without_right_answers(write: Write) -> None:
    path = write([{"id": 3}, {"id": "b", "question": ["one?", "two?"], "max_new_tokens": 5, "answers": ["1", "2"]}])

    first, second = read(path, 64)

    assert (first.id, first.question.prompt, first.question.max_new_tokens) == (3, "what?", 64)
    assert first.question.images[0].size == (256, 256)
    assert (second.id, second.question.prompt, second.question.max_new_tokens) == ("b", "one?\ntwo?", 5)


def test_tables_are_read_like_lines(write: Write, tmp_path: Path) -> None:
    path = write([]).with_suffix(".csv")
    path.write_text("id,image,question,max_new_tokens\n007,grey.png,what?,5\n7,grey.png,what?,\n")

    assert [(row.id, row.question.max_new_tokens) for row in read(path, 64)] == [("007", 5), ("7", 64)]


def test_no_picture_is_opened_before_it_is_asked_about(write: Write) -> None:
    assert survey(write([{"id": 1, "image": "nowhere.png"}]), 64).rows == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"id": 1}, {"id": 2}, {"id": "1"}], "line 3: id '1' is that of line 1, too; give each its own"),
        ([{"id": 1}, {}], "line 2: column 'id' is missing or empty; give each row one of its own"),
        ([{"id": 1.5}], "line 1: id=1.5: must be a text or a whole number"),
        ([{"id": True}], "line 1: id=True: must be a text or a whole number"),
        ([{"id": 1, "question": None}], "line 1: column 'question' is missing or empty"),
        ([{"id": 1, "image": []}], "line 1: column 'image' is empty"),
        ([{"id": 1, "max_new_tokens": 0}], "line 1: max_new_tokens=0: must be a whole number from 1 on"),
        ([{"id": 1, "max_new_tokens": "many"}], "line 1: max_new_tokens='many': must be a whole number"),
        ([], "holds no questions"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_at_once(write: Write, rows: list[dict[str, Any]], said: str) -> None:
    path = write(rows)

    with pytest.raises(FoveateError) as raised:
        survey(path, 64)
    assert str(raised.value).startswith(f"data={str(path)!r}: {said}")


def test_other_rows_have_another_digest(write: Write) -> None:
    found = [survey(write(rows), 64).digest for rows in ([{"id": 1}], [{"id": 1}], [{"id": 2}], [{"id": 1}, {"id": 2}])]

    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_a_survey_holds_ids_and_not_rows(write: Write) -> None:
    path = write([{"id": number, "question": f"{'long ' * 400}?"} for number in range(2000)])

    tracemalloc.start()
    survey(path, 64)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert most < path.stat().st_size / 4


def test_blocks_are_read_when_they_are_taken_and_leave_out_what_is_done(write: Write) -> None:
    seen: list[Any] = []

    def rows() -> Any:
        for row in read(write([{"id": number} for number in range(100)]), 64):
            seen.append(row.id)
            yield row

    done = {"1"}
    blocks = Blocks(rows(), done, 2)

    assert ids(blocks.take()) == [0, 2]
    assert seen == [0, 1, 2]
    done.add("4")
    second = blocks.take()
    assert ids(second) == [3, 5]
    blocks.put_back_alone(second)
    assert [ids(blocks.take()) for _ in range(3)] == [[3], [5], [6, 7]]
    while blocks.take():
        pass
    assert blocks.take() is None
    # What comes back late is still handed out.
    blocks.put_back_alone(second)
    assert ids(blocks.take()) == [3]


def ids(block: tuple[Asked, ...] | None) -> list[Any]:
    return [row.id for row in block or ()]


def test_an_array_is_read_too(write: Write) -> None:
    path = write([])
    path.write_text(json.dumps([{"id": "a", "image": "grey.png", "question": "what?"}]))

    assert [row.id for row in read(path, 64)] == ["a"]
