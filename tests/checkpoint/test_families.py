"""A checkpoint of every family, laid out as on the Hub, loads and answers about a picture, with and without torchvision."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from tests.hub import FAMILIES, write_checkpoint

import foveate
from foveate import FoveateError, checkpoint

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
