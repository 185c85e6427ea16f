"""The bench on a user's own data, and two results of it side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.cli.test_cli_errors import assert_one_line

from foveate.cli.own_data import OwnData
from foveate.tasks import questions


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five questions of the tiny model's world in a file, two of them with evidence."""
    rows = []
    for number, each in enumerate(questions("shape", 5, seed=3)):
        each.image.save(tmp_path / f"{number}.png")
        row = {"image": f"{number}.png", "question": each.prompt, "answers": [each.answer, "thing"]}
        rows.append(row | ({"evidence": [[10, 10, 40, 40]]} if number < 2 else {}))
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def bench(call: Any, tiny: Path, tmp_path: Path) -> Any:
    fixed = ["--model", tiny, "--methods", "none", "--batch-size", 2, "--keep", 0.25, "--out", tmp_path / "out"]
    return lambda *options: call("bench", *fixed, *options)


def test_a_bench_on_own_data(bench: Any, data: Path, tmp_path: Path) -> None:
    result = bench("--data", data, "--metric", "anls", "--max-new-tokens", 3)

    assert result.exit_code == 0, result.output
    records = json.loads((tmp_path / "out" / "results.json").read_text())
    assert {(each["task"], each["n"]) for each in records} == {("mine", 5)}
    assert records[0]["evidence_recall"] == 1
    assert "mine · always 'thing' scores 100.0 %" in result.stdout
    assert "mean over 1 task · always the same answer scores 100.0 %" in result.stdout
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert (settings["data"], settings["metric"], settings["max_new_tokens"]) == (str(data), "anls", 3)
    assert len(settings["digest"]) == 64


def test_a_table_under_a_metric_of_one_s_own(
    bench: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("metric_of_a_quarter.py").write_text("def quarter(prediction, answers):\n    return 0.25\n")
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    lines = [",".join([row["image"], row["question"].replace(",", ""), row["answers"][0]]) for row in rows]
    Path("table.csv").write_text("\n".join(["image,question,answer", *lines]))

    result = bench("--data", "table.csv", "--metric", "metric_of_a_quarter:quarter")

    assert result.exit_code == 0, result.output
    assert {each["score"] for each in json.loads((tmp_path / "out" / "results.json").read_text())} == {0.25}
    other = bench("--data", "table.csv", "--metric", "metric_of_a_quarter:third", "--resume")
    assert_one_line(other, "metric='metric_of_a_quarter:third'", "cannot be imported", "no attribute 'third'")


@pytest.fixture
def with_thin(data: Path) -> Path:
    """The second of five pictures is one that reference-qwen's processor refuses."""
    Image.new("RGB", (2000, 8), "red").save(data.parent / "1.png")
    data.write_text(data.read_text().replace(', "evidence": [[10, 10, 40, 40]]', ""))
    return data


def test_questions_about_a_picture_that_the_processor_refuses_are_left_out_and_named(
    call: Any, with_thin: Path, tmp_path: Path
) -> None:
    fixed = ["--model", "reference-qwen", "--methods", "none", "--keep", 0.25, "--max-new-tokens", 2, "--n", 3]
    result = call("bench", *fixed, "--data", with_thin, "--out", tmp_path / "out", "--timed", 1)

    assert result.exit_code == 0, result.output
    assert f"left out: data={str(with_thin)!r}: line 2: image={str(tmp_path / '1.png')!r}: 2000 x 8 pixels" in result.stderr
    (record,) = [each for each in json.loads((tmp_path / "out" / "results.json").read_text()) if each["method"] == "none"]
    (cell,) = (tmp_path / "out" / "cells").glob("mine.none.*")
    assert record["n"] == len(json.loads(cell.read_text())["answers"]) == 3


def test_they_are_left_out_of_parts_too(with_thin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = OwnData(with_thin).divide(0.5, 0, "reference-qwen")

    assert len(first) + len(second) == 4
    assert "line 2" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_a_single_picture_that_the_processor_refuses_is_one_line(
    call: Any, with_thin: Path, tmp_path: Path, command: str
) -> None:
    asked = ["--image", tmp_path / "1.png", "--prompt", "what colour?", "--recipe", "uniform(keep=0.5)"]
    result = call(command, *asked, "--model", "reference-qwen")

    assert_one_line(result, "1.png", "2000 x 8 pixels, which the model's processor refuses")


def test_evidence_is_empty_where_it_is_unknown(bench: Any, data: Path, tmp_path: Path) -> None:
    data.write_text("\n".join(data.read_text().splitlines()[2:]))
    bench("--data", data)

    assert {each["evidence_recall"] for each in json.loads((tmp_path / "out" / "results.json").read_text())} == {None}


def test_n_takes_the_first_rows(bench: Any, data: Path, tmp_path: Path) -> None:
    bench("--data", data, "--n", 2)

    (cell,) = (tmp_path / "out" / "cells").glob("mine.none.*")
    assert len(json.loads(cell.read_text())["answers"]) == 2


def test_resume_goes_on_with_the_same_data_and_refuses_others(bench: Any, data: Path) -> None:
    first = bench("--data", data)
    again = bench("--data", data, "--resume")
    data.write_text(data.read_text().replace('"thing"', '"object"'))

    assert again.stdout == first.stdout
    assert_one_line(bench("--data", data, "--resume"), "digest=", "cannot be mixed")
    assert_one_line(bench("--data", data, "--resume", "--metric", "vqa"), "digest=")


def test_resume_under_another_metric_is_refused_by_name(bench: Any, data: Path) -> None:
    bench("--data", data)

    assert_one_line(bench("--data", data, "--metric", "vqa", "--resume"), "metric='vqa'", "metric='exact'")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--tasks", "shape"], ["tasks='shape'", "data="]),
        (["--metric", "bleu"], ["metric='bleu'", "must be one of exact, contains"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--data", "absent.jsonl"], ["data='absent.jsonl': no such file"]),
    ],
)
def test_what_is_wrong_with_the_options_is_said(bench: Any, data: Path, options: list[str], fragments: list[str]) -> None:
    assert_one_line(bench("--data", data, *options), *fragments)


@pytest.mark.parametrize(
    ("row", "fragments"),
    [
        ({"image": "absent.png", "question": "what?", "answers": "x"}, ["line 6", "absent.png", "no such file"]),
        ({"image": "mine.jsonl", "question": "what?", "answers": "x"}, ["line 6", "is not a picture"]),
        ({"image": "0.png", "answers": "x"}, ["line 6", "column 'question' is missing"]),
        ({"image": "0.png", "question": "in <image>?", "answers": "x"}, ["leave out '<image>'"]),
    ],
)
def test_what_is_wrong_with_the_data_is_said_before_anything_is_measured(
    bench: Any, data: Path, tmp_path: Path, row: dict[str, Any], fragments: list[str]
) -> None:
    data.write_text(data.read_text() + "\n" + json.dumps(row))

    assert_one_line(bench("--data", data), *fragments)
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    ("option", "said"),
    [
        (["--max-new-tokens", "3"], "is for your own data"),
        (["--metric", "box"], "metric='box': must be one of exact, contains"),
        (["--metric", "bleu"], "metric='bleu': must be one of exact, contains"),
    ],
)
def test_options_of_data_need_data(bench: Any, option: list[str], said: str) -> None:
    assert_one_line(bench(*option), said, "--data")


def test_generated_tasks_take_another_metric(bench: Any, tmp_path: Path) -> None:
    result = bench("--tasks", "reading", "--methods", "none", "--metric", "anls", "--n", 2)

    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["metric"] == "anls"
    assert_one_line(bench("--tasks", "reading", "--methods", "none", "--n", 2, "--resume"), "metric=None", "metric='anls'")


def test_two_results_are_compared(call: Any, bench: Any, data: Path, tmp_path: Path) -> None:
    bench("--data", data)
    out = tmp_path / "out"

    result = call("bench", "compare", f"{out}:random@0.25", f"{out}:uniform@0.25")

    assert result.exit_code == 0, result.output
    assert "random 0.25 → uniform 0.25" in result.stdout
    assert " mine: no difference beyond noise (" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["compare", "absent", "absent"], ["folder='absent'", "no such folder"]),
        (["compare", "."], ["B"]),
        (["compare", ".", "."], ["holds no results of a bench"]),
        (["compar", ".", "."], ["compar", "Did you mean 'compare'?"]),
    ],
)
def test_compare_says_what_is_wrong(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], fragments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)

    assert_one_line(call("bench", *arguments), *fragments)
