"""LLaVA-OneVision and Qwen3-VL, of which there are no trained checkpoints here: random ones, as under `foveate.attach`.

Two engines more: `make test-serving SLOW=1`.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from foveate.models.processors import read_processor
from foveate.tasks import SPINE, questions
from tests.serving.vllm.both import LONGEST, ask, attached, engine, same, stop, toy, watch

RECIPE = "hiprune(keep=0.3)"
SIZES = [(64, 64), (128, 64), (64, 128), (100, 70), (96, 96), (48, 160)]
ASKED = [
    replace(each, images=tuple(image.resize(size) for image in each.images))
    for task, size in zip(SPINE, SIZES)
    for each in questions(task, 2, seed=5)
]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl"])
def test_answers_and_what_is_kept_are_those_of_transformers(family, tmp_path):
    folder = toy(family, tmp_path)
    llm = engine(folder, RECIPE)
    try:
        kept = watch(llm)
        # No end but the length: vLLM would find one in the tokenizer, too.
        ours = ask(llm, read_processor(folder), ASKED, longer=LONGEST)
        same(ours, attached(folder, RECIPE, ASKED), kept)
    finally:
        stop(llm)
