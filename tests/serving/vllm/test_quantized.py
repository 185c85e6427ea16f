"""A checkpoint that `foveate quantize --export` wrote, in vLLM as it is: eight bits of weights and of inputs."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from foveate import reference
from foveate.models.processors import read_processor
from foveate.tasks import questions
from tests.serving.vllm.both import ask, attached, engine, stop

pytestmark = pytest.mark.slow

FOVEATE = Path(__file__).parents[3] / ".venv/bin/foveate"
"""Of the environment of `make setup`: that of vLLM has a compressed-tensors that is too old to write with."""


@pytest.mark.skipif(not FOVEATE.exists(), reason="needs the environment of `make setup`, to write the checkpoint")
def test_eight_bits_answer_as_the_floats_do(tmp_path):
    folder = tmp_path / "w8a8"
    command = [FOVEATE, "quantize", "rtn(bits=8, activations=8)", "--out", tmp_path / "artifact", "--export", folder]
    subprocess.run([*command, "--model", "reference"], check=True, capture_output=True)
    asked = [each for task in ("shape", "attribute", "existence") for each in questions(task, 8, seed=5)]

    llm = engine(folder, None)
    try:
        ours = ask(llm, read_processor(folder), asked)
    finally:
        stop(llm)

    theirs = attached(reference.path("reference"), "none", asked)
    equal = sum(one.ids == other.ids for one, other in zip(ours, theirs))
    assert equal >= len(asked) - 1  # a near tie may fall otherwise
