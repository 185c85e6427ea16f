"""A checkpoint of every family, laid out as on the Hub, loads and answers about a picture, with and without torchvision."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from tests.hub import FAMILIES, write_checkpoint

import foveate
from foveate import FoveateError, checkpoint
from foveate.checkpoint.conversation import with_answers
from foveate.core.recipe import Recipe
from foveate.engine.calibrate import Calibration

PICTURE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
VIDEOS = ("llava_onevision", "internvl", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5")
"""Families whose processor reads videos, too."""

Written = Callable[[str], Path]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Written:
    """The folder of a family's checkpoint."""
    folder = tmp_path_factory.mktemp("hub")
    return lambda family: folder / family if (folder / family).is_dir() else write_checkpoint(family, folder / family)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_picture_is_answered_with_and_without_a_recipe(family: str, written: Written) -> None:
    loaded = checkpoint.load(str(written(family)), "cpu", "float32")
    inputs = loaded.inputs([[PICTURE]], ["what is it?"])

    answers, reports = [], []
    for recipe in ("none", "uniform(keep=0.5)"):
        with foveate.attach(loaded.model, recipe) as session:
            answers.append(loaded.model.generate(**inputs, do_sample=False, max_new_tokens=3))
        reports.append(session.report)

    assert [answer.shape[1] - inputs["input_ids"].shape[1] for answer in answers] == [3, 3]
    assert reports[1].visual_tokens[-1] < reports[0].visual_tokens[-1] == reports[0].original_visual_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_the_processor_is_the_familys_own(family: str, written: Written) -> None:
    processor = checkpoint.load_processor(str(written(family)))

    assert type(processor).__name__ == FAMILIES[family].picture["processor_class"]


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="videos are read here")
@pytest.mark.parametrize("family", VIDEOS)
def test_videos_are_refused_by_name_where_nothing_reads_them(family: str, written: Written) -> None:
    processor = checkpoint.load_processor(str(written(family)))

    with pytest.raises(FoveateError, match=r"video: cannot be read without torchvision; pip install 'foveate\[video\]'"):
        processor(text=[processor.video_token], videos=[[PICTURE, PICTURE]])


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="videos are read here")
def test_a_processor_without_videos_is_saved_with_all_that_it_was_read_with(written: Written, tmp_path: Path) -> None:
    checkpoint.load_processor(str(written("qwen3_vl"))).save_pretrained(tmp_path)

    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Qwen3VLProcessor"
    assert saved["video_processor"]["video_processor_type"] == "Qwen3VLVideoProcessor"
    assert saved["video_processor"]["size"] == FAMILIES["qwen3_vl"].video["size"]


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stand_behind_prompts_and_are_predicted_as_alone(family: str, written: Written) -> None:
    loaded = checkpoint.load(str(written(family)), "cpu", "float32")
    prompts, answers = ["what is it?", "and what is it on the other side?"], ["a mountain", "no"]
    plain, batch = loaded.inputs([[PICTURE]] * 2, prompts), loaded.answered([[PICTURE]] * 2, prompts, answers)

    for sample, answer in enumerate(answers):
        told = batch["input_ids"][sample][batch["labels"][sample] != -100]
        assert loaded.processor.decode(told[:-1]) == answer
        assert told[-1].item() in loaded.special
        there = batch["attention_mask"][sample].bool()
        asked = plain["input_ids"][sample][plain["attention_mask"][sample].bool()]
        assert torch.equal(batch["input_ids"][sample][there], torch.cat([asked, told]))
    (together,) = Calibration(loaded.model, [batch]).answers(Recipe())
    alone = [loaded.answered([[PICTURE]], [prompts[i]], [answers[i]]) for i in range(2)]
    apart = torch.cat(list(Calibration(loaded.model, alone).answers(Recipe())))
    torch.testing.assert_close(together, apart, rtol=1e-3, atol=1e-4)


def test_what_marks_kinds_of_tokens_says_text_of_answers() -> None:
    inputs = {
        "input_ids": torch.tensor([[0, 5, 7], [6, 7, 7]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "token_type_ids": torch.tensor([[0, 0, 1], [0, 1, 1]]),
        "pixel_values": torch.zeros(2, 3),
    }
    made = with_answers(inputs, [[8, 9], [8]], pad=0)

    assert made["input_ids"].tolist() == [[0, 5, 7, 8, 9], [0, 6, 7, 7, 8]]
    assert made["attention_mask"].tolist() == [[0, 1, 1, 1, 1], [0, 1, 1, 1, 1]]
    assert made["token_type_ids"].tolist() == [[0, 0, 1, 0, 0], [0, 0, 1, 1, 0]]
    assert made["labels"].tolist() == [[-100, -100, -100, 8, 9], [-100, -100, -100, -100, 8]]
    assert made["pixel_values"] is inputs["pixel_values"]
