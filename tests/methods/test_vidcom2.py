"""VidCom2: its formulas by hand, its limits, and videos of whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.roles import Item
from foveate.engine.session import attach
from foveate.methods import VidCom2
from foveate.methods.before_llm.vidcom2 import likeness, retained, shares
from tests.methods.bodiless import images
from tests.suite.bodies import BODIES, RAGGED
from tests.videos import prompt

VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")
FRAME = torch.tensor([[0, 0, 1, 1]])


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_likeness_by_hand() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [0.5, 0.0]]])
    of_video, of_frame = likeness(x, FRAME, 2, 1.0)

    def gaussians(distance: float) -> Tensor:
        return sum(torch.tensor(-distance / (2 * width)).exp() for width in (0.125, 0.25, 0.5, 1, 2))  # type: ignore[return-value]

    # The mean of all is (.75, .25), those of the frames are (.5, .5) and (1, 0).
    wanted = [gaussians(0.125), gaussians(1.125), gaussians(0.125), gaussians(0.125)]
    torch.testing.assert_close(of_video[0], torch.stack(wanted))
    wanted = [gaussians(0.5), gaussians(0.5), gaussians(0), gaussians(0)]
    torch.testing.assert_close(of_frame[0], torch.stack(wanted))


def test_the_channels_that_vary_least_are_compared() -> None:
    x = drawn(1, 4, 6) * torch.tensor([0.1, 9.0, 0.2, 9.0, 0.3, 9.0]) + 1
    some = likeness(x, FRAME, 2, 0.5)
    for mine, those in zip(some, likeness(x[..., ::2], FRAME, 2, 1.0)):
        torch.testing.assert_close(mine, those)


def test_a_frame_unlike_the_rest_gets_more() -> None:
    even = shares(torch.ones(1, 4), FRAME, 2, 0.5, 0.01)
    assert even.tolist() == [[1, 1]]
    of_video, frame = torch.tensor([[3.0] * 10 + [1.0] * 10]), torch.arange(2).repeat_interleave(10)[None]
    assert shares(of_video, frame, 2, 0.4, 0.01).tolist() == [[2, 6]]  # .4 * (1 -+ .5) of ten
    assert shares(of_video, frame, 2, 0.9, 0.01).tolist() == [[4, 10]]  # no more than there are
    assert shares(of_video, frame, 2, 0.01, 0.01).tolist() == [[1, 1]]
    assert shares(torch.ones(1, 3), torch.tensor([[0, 0, 2]]), 3, 0.5, 0.01).tolist() == [[1, 0, 1]]  # an empty frame


def test_the_budget_is_met_by_the_least_alike() -> None:
    alike = torch.tensor([[0.1, 0.2, 0.9, 0.8]])
    assert sorted(retained(alike, FRAME, torch.tensor([[1, 1]]), 2)[0].tolist()) == [0, 3]
    assert sorted(retained(alike, FRAME, torch.tensor([[1, 1]]), 3)[0].tolist()) == [0, 1, 3]  # one more: the least alike
    assert sorted(retained(alike, FRAME, torch.tensor([[1, 2]]), 2)[0].tolist()) == [0, 3]  # one too many: the most alike
    assert retained(torch.zeros(1, 4), FRAME, torch.tensor([[1, 1]]), 2)[0].tolist() == [0, 2]  # of equals the first


@given(st.integers(1, 6), st.integers(1, 12), st.floats(0.01, 1) | st.integers(1, 80))
def test_exactly_the_budget_stays_and_one_of_each_frame(frames: int, tokens: int, keep: int | float) -> None:
    method, count = VidCom2(keep=keep), frames * tokens
    k = method.wanted(Item(count, 1, 0, frames))
    batch = images(count, 1, x=drawn(1, count, 5), frames=frames)
    chosen = method.select(batch, k)[0].tolist()

    assert chosen == sorted(set(chosen))
    assert len(chosen) == k
    assert frames <= k <= count
    if k == max(int(count * keep) if isinstance(keep, float) else keep, frames):
        assert isinstance(keep, int) or k >= int(count * keep)


def test_videos_side_by_side_are_alone() -> None:
    x = drawn(3, 12, 6)
    together = VidCom2().select(images(12, 1, (0, 1, 2), x=x, frames=3), 4)
    alone = [VidCom2().select(images(12, 1, x=one[None], frames=3), 4)[0].tolist() for one in x]
    assert together.tolist() == alone


@pytest.mark.parametrize("family", VIDEOS)
def test_of_videos_of_a_prompt_what_stands_out_stays(family: str) -> None:
    videos = drawn(2, 4, 3, 32, 32) * 0.05
    videos[0, 2] *= 40
    model = BODIES[family].model()
    with attach(model, VidCom2(keep=0.5)) as session, torch.no_grad():
        model(**prompt(family, videos))
    tokens = 4 if family == "llava_onevision" else 16
    moving, still = (item.tolist() for item in session.trace.alive(1)[0])
    assert len(moving) == len(still) == 2 * tokens
    by_frame = [sum(place // tokens == frame for place in moving) for frame in range(4)]
    assert all(by_frame)
    assert by_frame[2] == max(by_frame)


def test_pictures_are_videos_of_one_frame() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with attach(model, VidCom2(keep=5)) as session, torch.no_grad():
        model(**body.inputs(RAGGED))
    assert [[len(item) for item in sample] for sample in session.trace.alive(1)] == [[5], [5, 5], [5]]
