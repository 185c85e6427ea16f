"""Own data becomes questions, and what is wrong with it is one line that says where."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from foveate.core.errors import FoveateError
from foveate.tasks import best_constant, read
from foveate.tasks.files import digest

GOOD = {"image": "red.png", "question": "what colour?", "answers": "red"}


@pytest.fixture(autouse=True)
def pictures(tmp_path: Path) -> None:
    Image.new("RGB", (40, 30), "red").save(tmp_path / "red.png")
    Image.new("L", (20, 20), 128).save(tmp_path / "grey.png")


def written(tmp_path: Path, *rows: Any) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows) + "\n")
    return path


def saved(tmp_path: Path, rows: list[dict[str, Any]]) -> datasets.Dataset:
    rows = [{**row, "image": str(tmp_path / row["image"])} for row in rows]
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


def test_a_row_is_a_question(tmp_path: Path) -> None:
    (asked,) = read(written(tmp_path, GOOD))

    assert (asked.task, asked.prompt, asked.answer, asked.metric) == ("mine", "what colour?", "red", "exact")
    assert asked.image.size == (40, 30)
    assert asked.image.getpixel((0, 0)) == (255, 0, 0)
    assert asked.evidence == ()
    assert asked.score(["Red"]) == 1


def test_several_pictures_and_turns(tmp_path: Path) -> None:
    row = {"image": ["red.png", "grey.png"], "question": ["first?", "second?"], "answers": ["red", ["grey", "gray"]]}

    (asked,) = read(written(tmp_path, row))

    assert [picture.size for picture in asked.images] == [(40, 30), (20, 20)]
    assert asked.images[1].mode == "RGB"
    assert [turn.answers for turn in asked.turns] == [("red",), ("grey", "gray")]
    assert asked.score(["red", "gray"]) == 1


@pytest.mark.parametrize(("found", "answers"), [(3, ("3",)), (2.0, ("2",)), (2.5, ("2.5",)), ([1, "one"], ("1", "one"))])
def test_numbers_are_answers(tmp_path: Path, found: Any, answers: tuple[str, ...]) -> None:
    (asked,) = read(written(tmp_path, {**GOOD, "answers": found}))

    assert asked.turns[0].answers == answers


def test_a_column_answer_will_do(tmp_path: Path) -> None:
    (asked,) = read(written(tmp_path, {"image": "red.png", "question": "what?", "answer": "red"}))

    assert asked.answer == "red"


@pytest.mark.parametrize("found", ["0 0 10 10", [0, 0, 10, 10], ["0 0 10 10", "20 20 30 30"], [[0, 0, 10, 10]]])
def test_an_answer_may_be_a_box(tmp_path: Path, found: Any) -> None:
    (asked,) = read(written(tmp_path, {**GOOD, "answers": found}), metric="point")

    assert [asked.score([said]) for said in ("5 5", "15, 15")] == [1, 0]


def test_a_row_may_have_a_metric_of_its_own(tmp_path: Path) -> None:
    asked = read(written(tmp_path, GOOD, {**GOOD, "metric": "contains"}))

    assert [each.score(["it is red"]) for each in asked] == [0, 1]


def test_boxes_of_evidence_become_masks(tmp_path: Path) -> None:
    row = {**GOOD, "image": ["red.png", "grey.png"], "evidence": [[0, 0, 10, 5], [35, 25.5, 99, 99]]}
    (asked,) = read(written(tmp_path, row))

    first, second = asked.evidence
    assert (first.shape, first.sum()) == ((30, 40), 50 + 5 * 5)
    assert (second.shape, second.any()) == ((20, 20), False)


def test_evidence_may_be_given_for_each_picture(tmp_path: Path) -> None:
    row = {**GOOD, "image": ["red.png", "grey.png"], "evidence": [[], [[0, 0, 2, 2]]]}
    (asked,) = read(written(tmp_path, row))

    assert [int(mask.sum()) for mask in asked.evidence] == [0, 4]


def test_an_empty_list_of_evidence_says_that_there_is_none(tmp_path: Path) -> None:
    (asked,) = read(written(tmp_path, {**GOOD, "evidence": []}))

    assert [int(mask.sum()) for mask in asked.evidence] == [0]


def test_the_first_so_many_rows_are_read(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, "", {**GOOD, "question": "second?"}, "no json")

    assert [each.prompt for each in read(path, n=2)] == ["what colour?", "second?"]


def test_the_best_constant_is_of_the_data_itself(tmp_path: Path) -> None:
    asked = read(written(tmp_path, GOOD, GOOD, {**GOOD, "answers": ["blue", "navy"]}))

    assert best_constant(asked) == "red"


def test_questions_travel_between_processes(tmp_path: Path) -> None:
    asked = read(written(tmp_path, {**GOOD, "evidence": [[0, 0, 2, 2]]}))

    (copy,) = pickle.loads(pickle.dumps(asked))
    assert np.array_equal(copy.image, asked[0].image)
    assert np.array_equal(copy.evidence[0], asked[0].evidence[0])


def test_a_saved_data_set_and_parquet_say_the_same_as_json_lines(tmp_path: Path) -> None:
    rows = [{**GOOD, "evidence": [[0, 0, 2, 2]]}, {**GOOD, "image": "grey.png", "evidence": None}]
    lines = written(tmp_path, *rows)
    saved(tmp_path, rows).save_to_disk(tmp_path / "saved")
    saved(tmp_path, rows).to_parquet(tmp_path / "own.parquet")

    for path in (tmp_path / "saved", tmp_path / "own.parquet"):
        for here, there in zip(read(path), read(lines), strict=True):
            assert np.array_equal(here.image, there.image)
            assert (here.prompt, here.answer, len(here.evidence)) == (there.prompt, there.answer, len(there.evidence))
        assert digest(path) == digest(lines)


def test_a_saved_data_set_of_splits_is_refused_with_their_names(tmp_path: Path) -> None:
    datasets.DatasetDict(train=saved(tmp_path, [GOOD]), test=saved(tmp_path, [GOOD])).save_to_disk(tmp_path / "splits")

    with pytest.raises(FoveateError, match="name the folder of one: test, train"):
        read(tmp_path / "splits")


@pytest.mark.parametrize("change", [{"question": "why?"}, {"answers": "blue"}, {"image": "grey.png"}, {"evidence": []}])
def test_other_data_has_another_digest(tmp_path: Path, change: dict[str, Any]) -> None:
    before = digest(written(tmp_path, GOOD, GOOD))

    assert digest(written(tmp_path, GOOD, {**GOOD, **change})) != before
    assert digest(written(tmp_path, GOOD, GOOD)) == before


def test_another_picture_under_the_same_name_has_another_digest(tmp_path: Path) -> None:
    before = digest(written(tmp_path, GOOD))
    Image.new("RGB", (40, 30), "blue").save(tmp_path / "red.png")

    assert digest(tmp_path / "mine.jsonl") != before


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"image": "red.png"', "line 2: is not JSON"),
        ("[1, 2]", "line 2: must be an object"),
        (b"\xff\xfe".decode("latin1"), "line 2: is not JSON"),
        ({**GOOD, "image": "absent.png"}, r"line 2: image=.*absent\.png': no such file"),
        ({**GOOD, "image": "mine.jsonl"}, r"line 2: image=.*mine\.jsonl': is not a picture that can be read"),
        ({**GOOD, "image": 3}, "line 2: image=3: must be a path"),
        ({**GOOD, "image": []}, "line 2: column 'image' is empty"),
        (
            {"question": "what?", "answers": "x"},
            "line 2: column 'image' is missing or empty; the columns are question, answers",
        ),
        ({"image": "red.png", "answers": "x"}, "line 2: column 'question' is missing"),
        ({"image": "red.png", "question": "what?"}, "line 2: column 'answers' is missing"),
        ({}, "line 2: column 'image' is missing or empty; the columns are none"),
        ({**GOOD, "answers": []}, r"line 2: answers=\[\]: must have one or more"),
        ({**GOOD, "answers": True}, "line 2: answers=True: must be a text or a number"),
        ({**GOOD, "question": 7}, "line 2: question=7: must be a text, or a list of texts"),
        ({**GOOD, "question": []}, r"line 2: question=\[\]: must be a text"),
        ({**GOOD, "question": ["one?", "two?"]}, "line 2: answers='red': must be a list with one entry for each of the 2"),
        ({**GOOD, "metric": "bleu"}, "line 2: metric='bleu': must be one of"),
        ({**GOOD, "metric": "box"}, "line 2: answer='red': must be a box"),
        ({**GOOD, "evidence": "here"}, "line 2: evidence='here': must be a list of boxes"),
        ({**GOOD, "evidence": [[50, 0, 60, 9]]}, r"line 2: evidence=\[50, 0, 60, 9\]: must be .* 40 x 30 pixels"),
        ({**GOOD, "evidence": [[], []]}, "line 2: evidence: has boxes for 2 pictures, and there are 1"),
    ],
)
def test_what_is_wrong_with_a_row_is_said_with_its_line(tmp_path: Path, row: Any, message: str) -> None:
    with pytest.raises(FoveateError, match=rf"^data='.*mine\.jsonl': {message}"):
        read(written(tmp_path, GOOD, row))


def test_a_picture_that_is_cut_short_is_found_out_at_once(tmp_path: Path) -> None:
    whole = (tmp_path / "red.png").read_bytes()
    (tmp_path / "red.png").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(FoveateError, match=r"line 1: image=.*red\.png': is not a picture"):
        read(written(tmp_path, GOOD))


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_file_without_questions_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text(content)

    with pytest.raises(FoveateError, match="holds no questions"):
        read(path)


def test_an_unknown_metric_is_refused_first(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"^metric='bleu'"):
        read(tmp_path / "absent.jsonl", metric="bleu")


def test_files_that_are_no_data_are_refused(tmp_path: Path) -> None:
    (tmp_path / "fake.parquet").write_text("no")

    for name, message in (
        ("absent.jsonl", "no such file"),
        ("fake.parquet", "is not a parquet"),
        ("", "save_to_disk"),
        ("red.png", "line 1: is not JSON"),
    ):
        with pytest.raises(FoveateError, match=message):
            read(tmp_path / name)


def test_a_missing_library_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("datasets", "pyarrow", "pyarrow.parquet"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (tmp_path / "own.parquet").touch()

    for path in (tmp_path, tmp_path / "own.parquet"):
        with pytest.raises(FoveateError, match=r"pip install 'foveate\[data\]'"):
            read(path)


def test_an_array_says_the_same_as_lines(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "image": ["red.png", "grey.png"], "answers": ["a", 2]}]
    lines, array = written(tmp_path, *rows), tmp_path / "array.json"
    array.write_text(f"\ufeff{json.dumps(rows, indent=1)}\n")

    assert [(each.prompt, each.turns[0].answers) for each in read(array)] == [
        (each.prompt, each.turns[0].answers) for each in read(lines)
    ]
    assert digest(array) == digest(lines)


def table(tmp_path: Path, *lines: str, ending: str = "csv") -> Path:
    path = tmp_path / f"mine.{ending}"
    path.write_bytes("\r\n".join(lines).encode("utf-8-sig"))
    return path


@pytest.mark.parametrize(("ending", "separator"), [("csv", ","), ("tsv", "\t")])
def test_cells_of_a_table_are_texts_as_they_stand(tmp_path: Path, ending: str, separator: str) -> None:
    rows = [("image", "question", "answers", "metric"), ("red.png", '"one,\ttwo\nthree?"', "12.50", "")]
    rows += [("grey.png", "and?", "NA", "contains"), ("grey.png", "x?", "[sic", "anls")]

    asked = read(table(tmp_path, *(separator.join(row) for row in rows), ending=ending))

    assert [(each.prompt, each.answer, each.metric) for each in asked] == [
        ("one,\ttwo\nthree?", "12.50", "exact"),
        ("and?", "NA", "contains"),
        ("x?", "[sic", "anls"),
    ]


def test_cells_of_a_table_may_be_lists(tmp_path: Path) -> None:
    row = ['["red.png", "grey.png"]', '["first?", "second?"]', '["red", ["grey", "gray"]]', "[[0, 0, 2, 2]]"]

    quoted = "\t".join('"{}"'.format(cell.replace('"', '""')) for cell in row)
    (asked,) = read(table(tmp_path, "image\tquestion\tanswers\tevidence", quoted, ending="tsv"))

    assert [turn.answers for turn in asked.turns] == [("red",), ("grey", "gray")]
    assert [int(mask.sum()) for mask in asked.evidence] == [4, 0]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            ["image,question", "red.png,what?"],
            "line 2: column 'answers' is missing or empty; the columns are image, question",
        ),
        (["image,question,answers", "red.png,what?,"], "line 2: column 'answers' is missing or empty"),
        (["image,question,answers", "red.png,what?,a,b"], "line 2: has 4 cells for 3 columns; quote"),
        (["image,question,answers", "red.png,what?"], "line 2: has 2 cells for 3 columns"),
        (["image,question,answers", "", "gone.png,what?,a"], r"line 3: image='.*gone\.png': no such file"),
        (["image,image,answers"], "line 1: has two columns 'image'"),
        (["image,question,answers", 'red.png,"what?,a'], "line 2: is no line of a table"),
        (["image,question,answers"], "holds no questions"),
        ([], "holds no questions"),
    ],
)
def test_what_is_wrong_with_a_table_is_said_with_its_line(tmp_path: Path, lines: list[str], message: str) -> None:
    with pytest.raises(FoveateError, match=rf"^data='.*mine\.csv': {message}"):
        read(table(tmp_path, *lines))


def test_a_table_in_another_encoding_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_bytes("image,question,answers\nred.png,größe?,a\n".encode("latin1"))

    with pytest.raises(FoveateError, match=r"mine\.csv': is not UTF-8 .*; save it as such"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("array.json", '[{"image": "red.png",\n "question" "what?"}]', r"line 2: is not JSON \(Expecting ':' delimiter\)$"),
        ("array.json", '[{"image": "red.png"}, 3]', "row 1: column 'question'"),
        ("array.json", "[3]", "row 1: must be an object"),
        ("array.json", "[]", "holds no questions"),
        ("table.txt", "image,question,answers\n", r"line 1: is not JSON .*a table is known by its ending: \.csv"),
    ],
)
def test_what_is_wrong_with_an_array_is_said(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)

    with pytest.raises(FoveateError, match=rf"^data='.*{name}': {message}"):
        read(tmp_path / name)


def test_columns_of_mixed_types_are_read_from_lines_whose_types_differ(tmp_path: Path) -> None:
    asked = read(written(tmp_path, GOOD, {**GOOD, "answers": 3}, {**GOOD, "answers": ["a", 2.5]}))

    assert [each.turns[0].answers for each in asked] == [("red",), ("3",), ("a", "2.5")]


def test_a_metric_that_fails_is_found_out_before_anything_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "metric_of_percents.py").write_text("def percent(prediction, answers):\n    return 100.0\n")
    monkeypatch.syspath_prepend(tmp_path)

    with pytest.raises(FoveateError, match=r"line 1: metric='metric_of_percents:percent': gave 100\.0 for .* in \[0, 1\]"):
        read(written(tmp_path, GOOD), metric="metric_of_percents:percent")
