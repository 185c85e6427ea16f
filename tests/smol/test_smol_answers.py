"""SmolLM2 as it was published, from its package: ``make test-smol``."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest

from foveate import FoveateError, checkpoint
from foveate.checkpoint import Checkpoint, smol
from foveate.engine.hosting import verdicts

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()


@cache
def loaded(dtype: str = "float32") -> Checkpoint:
    """The model; skips where its package is missing."""
    try:
        smol.path()
    except FoveateError as error:
        pytest.skip(str(error))
    return checkpoint.load("smol", "cpu", dtype)


def ask(prompt: str, recipe: str = "none", dtype: str = "float32") -> tuple[str, Any]:
    model = loaded(dtype)
    with model.attach(recipe) as session:
        (said,) = model.answer(model.inputs([[]], [prompt]), 24)
    return said, session.report


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_answers_as_published(dtype: str) -> None:
    assert ask("What is the capital of France?", dtype=dtype)[0] == "The capital of France is Paris."


def test_a_fifth_of_a_long_prompt_is_enough_to_go_on_with() -> None:
    prompt = f"{LICENSE[:3000]}\n\nWhat is the capital of France?"
    plain, full = ask(prompt)
    said, report = ask(prompt, "snapkv(keep=0.2)")

    assert plain == said == "The capital of France is Paris."
    assert max(report.kv_kept) < 0.22
    assert sum(report.kv_bytes) < 0.22 * sum(full.kv_bytes)


def test_it_is_a_text_model_of_thirty_layers() -> None:
    traits = loaded().traits
    runs = {each.method for each in verdicts({"smol": loaded().model}) if each.reason is None}

    assert (traits.family, traits.decoder_layers, traits.heads) == ("text", 30, 9)
    assert {"h2o", "kivi", "snapkv", "streamingllm"} <= runs
    assert not {"fastv", "hiprune", "shortv"} & runs
