"""Commands on a model that reads text alone."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.cli.conftest import Call
from tests.hub import write_text_checkpoint

from foveate.cli.calibrate import CalibrateRequest, questions
from foveate.tasks import TEXTS

LONG = "what is it? " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text_checkpoint(tmp_path_factory.mktemp("text"))


def test_a_prompt_without_a_picture_is_answered_with_and_without_a_recipe(call: Call, model: Path) -> None:
    done = call("run", "--model", model, "--prompt", LONG, "--recipe", "snapkv(keep=0.2)", "--max-new-tokens", 3)

    assert done.exit_code == 0, done.output
    (cached,) = [line.strip() for line in done.stdout.splitlines() if "tokens in cache" in line]
    plain, kept = (float(share) for share in cached.removeprefix("tokens in cache").replace("%", "").split())
    assert plain == 100
    assert 20 <= kept < 22
    assert "visual" not in done.stdout


def test_a_prompt_that_is_too_short_is_said_to_be_left_alone(call: Call, model: Path) -> None:
    done = call("run", "--model", model, "--prompt", "why?", "--recipe", "snapkv(keep=0.2)", "--max-new-tokens", 2)

    assert "snapkv(keep=0.2) changed nothing of the prompt (21 tokens)" in done.stdout


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--image", "photo.png"], "image: the model reads text alone; leave it out, or use a vision-language model"),
        (["--recipe", "fastv"], "fastv: acts on the tokens of pictures, and this is a model of text alone; use a method of"),
    ],
)
def test_what_needs_pictures_is_one_line(call: Call, model: Path, picture: Path, options: list[str], said: str) -> None:
    done = call("run", "--model", model, "--prompt", "why?", *(picture if each == "photo.png" else each for each in options))

    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"foveate: {said}")


def test_a_model_of_pictures_is_given_one(call: Call, tiny: Path) -> None:
    done = call("run", "--model", tiny, "--prompt", "why?")

    assert done.exit_code == 2
    assert done.stderr == "foveate: image: give one; prompts without are for text models, such as --model smol\n"


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (
            ["inspect", "--task", "attribute", "--recipe", "snapkv"],
            "model=.*: reads text alone, and pictures are what is drawn",
        ),
        (
            ["inspect", "--prompt", "why?", "--recipe", "snapkv"],
            "model=.*: reads text alone, and pictures are what is drawn; ",
        ),
        (["probe", "information-horizon"], "model=.*: reads text alone, and probes look at the tokens of pictures; "),
        (
            ["calibrate", "alvts", "--n", "1"],
            "alvts: acts on the tokens of pictures, and this is a model of text alone; use",
        ),
        (["calibrate", "index_preserving", "--n", "1"], "index_preserving: acts on the tokens of pictures, and"),
        (["calibrate", "modes", "--n", "1"], "modes: text has no experts; load a mixture-of-experts model"),
        (["quantize", "mbq(group_size=16)", "--n", "1"], "mbq: acts on the tokens of pictures, and this is a model of text"),
    ],
)
def test_commands_about_pictures_are_refused_in_one_line(
    call: Call, model: Path, tmp_path: Path, command: list[str], said: str
) -> None:
    done = call(*command, "--model", model, "--out", tmp_path)

    assert done.exit_code == 2, done.output
    (line,) = done.stderr.splitlines()
    assert re.match(f"foveate: {said}", line), line


def test_a_stream_is_refused_in_one_line(call: Call, model: Path, picture: Path) -> None:
    done = call("watch", picture, "--ask", "what?", "--model", model, "--recipe", "streamingllm(keep=8)")

    assert done.exit_code == 2
    assert done.stderr == "foveate: stream: is of pictures, and the model reads text alone; use a vision-language model\n"


def test_the_matrix_says_what_runs_on_it(call: Call, model: Path) -> None:
    done = call("methods", "--matrix", "--model", model, "--json")
    works = {entry["method"] for entry in json.loads(done.stdout) if entry["works"]}

    assert {"h2o", "kivi", "snapkv", "streamingllm"} <= works
    assert not {"fastv", "hiprune", "aircache"} & works


def test_its_weights_are_quantized(call: Call, model: Path, tmp_path: Path) -> None:
    made = call("quantize", "rtn(bits=8, group_size=-1)", "--model", model, "--out", tmp_path)
    assert made.exit_code == 0, made.output
    recipe = "rtn(bits=8, group_size=-1) + snapkv(keep=0.5, window=4)"
    done = call(
        "run", "--model", model, "--artifacts", tmp_path, "--prompt", LONG, "--recipe", recipe, "--max-new-tokens", 2
    )

    assert done.exit_code == 0, done.output


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of one's own, without a picture."""
    asked = [{"question": f"what is {number} and one? " * 3, "answer": str(number + 1)} for number in range(6)]
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in asked))
    return path


def test_numbers_are_calibrated_on_prompts_without_pictures(call: Call, model: Path, rows: Path, tmp_path: Path) -> None:
    for command in (("calibrate", "uat"), ("quantize", "gptq(group_size=16)")):
        made = call(*command, "--model", model, "--data", rows, "--n", 2, "--out", tmp_path)
        assert made.exit_code == 0, made.output
    recipe = "gptq(group_size=16) + uat"
    done = call(
        "run", "--model", model, "--artifacts", tmp_path, "--prompt", LONG, "--recipe", recipe, "--max-new-tokens", 2
    )

    assert done.exit_code == 0, done.output


def test_what_is_calibrated_without_data_reads_texts(model: Path) -> None:
    request = CalibrateRequest("uat", str(model), None, 1, None, 0, "cpu", "float32", 1)

    assert [each.task for each in questions(request)] == list(TEXTS)


def test_bench_and_tune_ask_questions_of_ones_own(call: Call, model: Path, rows: Path, tmp_path: Path) -> None:
    done = call(
        "bench",
        "--model",
        model,
        "--data",
        rows,
        "--methods",
        "h2o",
        "--keep",
        0.5,
        "--timed",
        1,
        "--out",
        tmp_path / "bench",
    )
    assert done.exit_code == 0, done.output
    assert len(json.loads((tmp_path / "bench" / "results.json").read_text())) == 3
    assert (tmp_path / "bench" / "quality_cache.png").is_file()
    assert not (tmp_path / "bench" / "quality_speed.png").exists()
    page = (tmp_path / "bench" / "report.html").read_text()
    assert "how many times smaller the cache is (log scale)" in page
    assert "prefill speed-up (log scale)" not in page

    options = (
        "--methods",
        "h2o",
        "--max-drop",
        0.9,
        "--trials",
        1,
        "--rungs",
        1,
        "--validate",
        1,
        "--out",
        tmp_path / "tune",
    )
    done = call("tune", "--model", model, "--data", rows, *options)
    assert done.exit_code == 0, done.output
    evidence = json.loads((tmp_path / "tune" / "evidence.json").read_text())
    # What the cache's methods save, beside what any of them must beat.
    assert evidence["promise"].startswith("least kv")
    assert "random_kv" in evidence["settings"]["methods"]
    assert [each["recipe"].partition("(")[0] for each in evidence["baselines"]] == ["random_kv"]


def test_bench_asks_it_about_text(call: Call, model: Path, tmp_path: Path) -> None:
    tasks, methods = "text-lookup,text-dialogue", "h2o,snapkv(window=4)"
    options = ("--tasks", tasks, "--methods", methods, "--keep", "0.5,0.2", "--n", 2, "--timed", 1, "--out", tmp_path)
    done = call("bench", "--model", model, *options)

    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "results.json").read_text())
    cells = [(each["task"], each["method"], each["keep"]) for each in found]
    compared = ("random_kv", "h2o", "snapkv(window=4)")
    per_task = [("none", None), *((method, keep) for method in compared for keep in (0.5, 0.2))]
    assert cells == [(task, *cell) for task in tasks.split(",") for cell in per_task]
    plain, ample, small = (found[place]["kv_bytes"] for place in (0, 5, 6))
    assert small < ample < plain
    assert "left out" not in done.output
    assert (tmp_path / "quality_cache.png").is_file()


def test_what_a_text_model_can_be_asked_is_said_in_one_line(call: Call, model: Path, tiny: Path) -> None:
    done = call("bench", "--model", model, "--tasks", "attribute", "--methods", "h2o")
    assert done.exit_code == 2
    assert done.stderr.startswith("foveate: tasks='attribute': asks about pictures, which a text model does not see; ")
    assert done.stderr.endswith("is asked some of text-needle, text-needles, text-lookup, text-dialogue\n")

    done = call("bench", "--model", tiny, "--tasks", "text-needle", "--methods", "h2o")
    assert done.exit_code == 2
    assert done.stderr.startswith("foveate: tasks='text-needle': is about text alone; ")
