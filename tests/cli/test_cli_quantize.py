"""``foveate quantize``: from a checkpoint and questions to a smaller one that answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tests.cli.test_cli_errors import assert_one_line
from transformers import AutoModelForImageTextToText

from foveate import checkpoint
from foveate.core.artifact import Artifact


def test_weights_are_quantized_and_run_beside_other_methods(call: Any, tiny: Path, picture: Path, tmp_path: Path) -> None:
    out, recipe = tmp_path / "out", "rtn(bits=4, clip=True)"
    before = sorted(path.stat().st_mtime_ns for path in tiny.rglob("*"))
    made = call("quantize", recipe, "--model", tiny, "--out", out, "--export", tmp_path / "smaller")

    assert made.exit_code == 0, made.output
    first, *paths = made.stdout.strip().splitlines()
    assert "bits each on disk (integers 4" in first
    assert paths == [str(out / "rtn.json"), str(tmp_path / "smaller")]
    assert made.stderr.strip() == f"other commands take it with --artifacts {out}"
    assert sorted(path.stat().st_mtime_ns for path in tiny.rglob("*")) == before
    asked = ["run", "--image", picture, "--prompt", "where is it?", "--max-new-tokens", 2, "--model", tiny]
    ran = call(*asked, "--recipe", f"{recipe} + hiprune(keep=4)", "--artifacts", out)
    assert ran.exit_code == 0, ran.output
    assert "bits each in memory; no kernel for 100% of the linears" in " ".join(ran.stdout.split())
    assert_one_line(call(*asked, "--recipe", recipe), "run `foveate quantize")
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "smaller").config.quantization_config
    smaller = checkpoint.load(str(tmp_path / "smaller"), "cpu", "float32")
    assert smaller.processor.chat_template


def test_samples_are_asked_with_their_answers_and_a_finished_run_is_not_made_again(
    call: Any, tiny: Path, tmp_path: Path
) -> None:
    given = ["quantize", "gptq(bits=4)", "--model", tiny, "--n", 1, "--batch-size", 2, "--out", tmp_path]
    made = call(*given)
    assert made.exit_code == 0, made.output
    block = tmp_path / "gptq" / "block-01.safetensors"
    written, content = block.stat().st_mtime_ns, block.read_bytes()
    assert call(*given).exit_code == 0
    assert block.stat().st_mtime_ns == written
    other = call(*given, "--seed", 1)
    assert other.exit_code == 0
    assert block.read_bytes() != content


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["hiprune"], ["hiprune", "replaces no weights"]),
        (["rtn(bits=9)"], ["rtn: bits=9", "must be"]),
        (["rtn(group_size=7)"], ["rtn: group_size=7", "must be"]),
        (["rtn(bits=4, symmetric=False)", "--export", "exported"], ["symmetric=False", "symmetric=True"]),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], fragments: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert_one_line(call("quantize", *options, "--model", tiny, "--out", tmp_path / "out"), *fragments)
    assert not list(tmp_path.rglob("*.json"))


def test_in_a_recipe_samples_are_read_by_what_acts_in_front(call: Any, tiny: Path, tmp_path: Path) -> None:
    recipe = "gptq(bits=4) + hiprune(keep=4) + snapkv(keep=0.5)"
    made = call("quantize", recipe, "--model", tiny, "--n", 1, "--batch-size", 2, "--out", tmp_path / "beside")
    assert made.exit_code == 0, made.output
    assert "samples were read without snapkv" in " ".join(made.stderr.split())
    alone = call("quantize", "gptq(bits=4)", "--model", tiny, "--n", 1, "--batch-size", 2, "--out", tmp_path / "alone")
    assert alone.exit_code == 0, alone.output
    names = ["gptq.json", "gptq/block-01.safetensors"]
    (_, block), (_, other) = ([(tmp_path / kind / name).read_bytes() for name in names] for kind in ("beside", "alone"))
    assert block != other
    assert Artifact.load(tmp_path / "beside" / "gptq.json").numbers["before"] == "hiprune(keep=4)"
    assert_one_line(call("quantize", "gptq + rtn", "--model", tiny), "must have one method that replaces weights")
