"""What a user may get wrong: one line on stderr that names it, exit code 2, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from foveate import reference


def assert_one_line(result: Any, *fragments: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: ")
    for fragment in fragments:
        assert fragment in line


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--recipe", "hiprun(keep=4)"], ["hiprun", "did you mean 'hiprune'?"]),
        (["--recipe", "hiprune(kep=4)"], ["kep", "did you mean 'keep'?"]),
        (["--recipe", "hiprune(keep=4"], ["hiprune(keep=4", "was never closed"]),
        (["--recipe", "hiprune(keep=0)"], ["keep=0", "positive"]),
        (["--recipe", "hiprune(keep=1e9)"], ["keep=1000000000.0", "ratio"]),
        (["--recipe", "absent.yaml"], ["absent.yaml", "cannot be read"]),
        (["--recipe", "someone/quick"], ["Hub 'someone/quick'", "recipe.yaml cannot be fetched", "check the name"]),
        (["--image", "absent.png"], ["image='absent.png'", "no such file"]),
        (["--image", "."], ["image='.'", "not a picture"]),
        (["--model", "./absent"], ["model='./absent'", "reference"]),
        (["--model", "absent"], ["model='absent'", "reference"]),
        (["--prompt", "what <image> is it?"], ["prompt=", "leave out '<image>'"]),
        (["--device", "toaster"], ["device='toaster'"]),
        (["--dtype", "int3"], ["dtype='int3'", "float32"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens"]),
        (["--companion", "./absent"], ["companion='./absent'", "CLIP checkpoint"]),
        (["--companion", str(reference.path())], ["companion=", "is a llava model; must be a CLIP model"]),
    ],
)
def test_run_says_what_is_wrong(call: Any, tiny: Path, picture: Path, options: list[str], fragments: list[str]) -> None:
    defaults = {"--image": picture, "--prompt": "where is the star?", "--model": tiny}
    given = defaults | dict(zip(options[::2], options[1::2], strict=True))

    assert_one_line(call("run", *(part for option in given.items() for part in option)), *fragments)


def test_a_text_that_calls_itself_a_picture_is_found_out(call: Any, tmp_path: Path) -> None:
    fake = tmp_path / "fake.png"
    fake.write_text("I am a picture, really.")

    assert_one_line(call("run", "--image", fake, "--prompt", "what is this?"), "fake.png", "not a picture")


def test_a_picture_that_is_cut_short_is_found_out(call: Any, picture: Path) -> None:
    picture.write_bytes(picture.read_bytes()[:-100])

    assert_one_line(call("run", "--image", picture, "--prompt", "what is this?"), "picture.png", "not a picture")


def test_a_folder_without_a_model_is_found_out(call: Any, tmp_path: Path, picture: Path) -> None:
    assert_one_line(call("run", "--image", picture, "--prompt", "what?", "--model", tmp_path), "model=", "cannot be loaded")


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--tasks", "shapes"], ["tasks='shapes'", "did you mean 'shape'?"]),
        (["--tasks", "juggling"], ["tasks='juggling'", "attribute"]),
        (["--methods", "fastvv"], ["fastvv", "did you mean 'fastv'?"]),
        (["--methods", "hiprune(alpha=0.1"], ["hiprune(alpha=0.1"]),
        (["--keep", "0"], ["keep=0"]),
        (["--keep", "1e9"], ["keep=1000000000.0"]),
        (["--keep", "few"], ["keep='few'"]),
        (["--model", "./absent"], ["model='./absent'"]),
        (["--n", "0"], ["--n"]),
        (["--frobnicate"], ["--frobnicate"]),
    ],
)
def test_bench_says_what_is_wrong(call: Any, tmp_path: Path, options: list[str], fragments: list[str]) -> None:
    assert_one_line(call("bench", "--out", tmp_path / "out", *options), *fragments)


def test_a_mistake_leaves_nothing_behind_that_is_in_the_way(call: Any, tmp_path: Path) -> None:
    call("bench", "--out", tmp_path / "out", "--model", "./absent")

    assert_one_line(call("bench", "--out", tmp_path / "out", "--model", "./absent"), "model=")


def test_a_folder_that_cannot_be_written_is_named(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()

    assert_one_line(call("bench", "--out", tmp_path / "file" / "out"), "out=", "cannot be written")


def test_results_in_the_way_are_named_with_the_remedy(call: Any, tmp_path: Path) -> None:
    (tmp_path / "results.json").touch()

    assert_one_line(call("bench", "--out", tmp_path), "out=", "--resume")


def test_a_method_with_nothing_to_calibrate_is_named(call: Any) -> None:
    assert_one_line(call("calibrate", "uniform"), "uniform", "nothing to calibrate")
    assert_one_line(call("calibrate", "shortv + alvts"), "shortv + alvts", "must be one method")
    assert_one_line(call("calibrate", "none"), "none", "must be one method")


def test_a_model_without_the_matrix_is_found_out(call: Any) -> None:
    assert_one_line(call("methods", "--model", "reference"), "--model", "--matrix")


def test_a_method_that_is_not_there_brings_the_closest_to_mind(call: Any) -> None:
    assert_one_line(call("methods", "hiprun"), "unknown method 'hiprun'", "did you mean 'hiprune'?")


def test_a_method_and_the_matrix_are_two_questions(call: Any) -> None:
    assert_one_line(call("methods", "scope", "--matrix"), "--matrix", "'scope' says where that method runs")


def test_an_unknown_command_is_named(call: Any) -> None:
    assert_one_line(call("bnch"), "bnch", "Did you mean 'bench', ")


def test_the_installed_command_says_it_on_stderr_with_exit_code_2() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from foveate.cli import main; main()", "run", "--image", "absent.png", "--prompt", "what?"],
        capture_output=True,
        text=True,
    )

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "foveate: image='absent.png': no such file\n"


def test_a_torchvision_for_another_torch_is_named_with_its_remedy(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    broken = "raise RuntimeError('operator torchvision::nms does not exist')"
    (tmp_path / "torchvision" / "__init__.py").write_text(broken)
    about = tmp_path / "torchvision-0.21.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.21.0\n")
    command = [sys.executable, "-c", "from foveate.cli import main; main()", "methods", "--matrix", "--model", "reference"]
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))

    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})

    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("foveate: torchvision 0.21.0: does not work with torch ")
    assert "(operator torchvision::nms does not exist); pip uninstall torchvision" in line
