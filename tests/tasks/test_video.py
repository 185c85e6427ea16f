"""A video file as the codec sees it, and the way from the file to an answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny
from tests.film import COUNT, GROUP, SIZE, write_film
from tests.suite.bodies import BODIES
from tests.videos import prompt
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.tasks.video import Video, read_video

av = pytest.importorskip("av")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_film(tmp_path_factory.mktemp("video") / "square.mp4")


@pytest.fixture(scope="module")
def video(file: Path) -> Video:
    return read_video(file, 8)


def test_frames_are_spread_over_the_file(video: Video) -> None:
    assert video.frames.shape == (8, SIZE, SIZE, 3)
    assert video.residual.shape == (8, 3, SIZE, SIZE)
    assert video.seconds[0] == 0
    assert float(video.seconds[-1]) == pytest.approx((COUNT - 1) / 12, abs=0.01)


def test_what_moves_is_in_the_residual_and_what_stands_still_is_not(video: Video) -> None:
    changed = video.residual.abs().mean((1, 2, 3))
    still, running = changed[2], changed[-1]  # within the first group, and in the last
    assert running > 5 * still
    band, rest = video.residual[-1, :, 16:32].abs().mean(), video.residual[-1, :, 40:].abs().mean()
    assert band > 5 * rest


def test_packet_sizes_are_those_of_the_group(video: Video) -> None:
    first, last = float(video.packet_size[0]), float(video.packet_size[-1])
    assert len(set(video.packet_size.tolist())) == COUNT // GROUP
    assert first < last


@pytest.mark.parametrize(
    ("name", "frames", "words"),
    [("square.mp4", COUNT + 1, "frames=25: .* has 24; ask for no more"), ("none.mp4", 1, "cannot be read")],
)
def test_what_cannot_be_read_is_refused(file: Path, name: str, frames: int, words: str) -> None:
    with pytest.raises(FoveateError, match=words):
        read_video(file.with_name(name), frames)


def pixels(video: Video) -> Tensor:
    """``[T, 3, 32, 32]`` as an encoder would be fed."""
    frames = video.frames.permute(0, 3, 1, 2).float() / 127.5 - 1
    return torch.nn.functional.interpolate(frames, size=(32, 32), mode="bilinear", antialias=True)


def test_from_the_file_to_an_answer_where_the_model_takes_videos(video: Video) -> None:
    model, inputs = BODIES["qwen2_vl"].model(), prompt("qwen2_vl", pixels(video)[None])
    recipe = "metom(tau=0.0, budget=0.5, tau_tem=2.0, rate=0.5)"
    with foveate.attach(model, recipe) as session, session.side(videos=video.side):
        answer = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert answer.shape[1] == inputs["input_ids"].shape[1] + 3
    assert session.report.visual_tokens[0] == 8 * 16 // 2
    assert session.report.visual_tokens[-1] == 8 * 16 // 4


def test_from_the_file_to_an_answer_where_frames_are_pictures(video: Video) -> None:
    model = BODIES["llava-clip"].model()
    ids = torch.tensor([[1, *[tiny.IMAGE] * 16 * 8, 20, 21, 22]])
    side = {"residual": list(video.residual), "packet_size": video.packet_size.tolist()}
    with foveate.attach(model, "metom(budget=0.5, tau_tem=2.0, rate=0.0)") as session, session.side(images=side):
        model.generate(input_ids=ids, pixel_values=pixels(video), max_new_tokens=2, do_sample=False)
        alive = [len(item) for item in session.trace.alive(1)[0]]
    assert sum(alive) <= 8 * 16 // 2
    assert sum(alive[-3:]) > sum(alive[:3])  # frames that run have the larger packets
