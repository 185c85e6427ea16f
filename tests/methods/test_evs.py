"""EVS: the card's examples, its count, and videos of whole models."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.engine.session import Session, attach
from foveate.methods import EVS
from foveate.methods.before_llm.evs import dissimilarity, retained
from tests.methods.bodiless import images
from tests.suite.bodies import BODIES, RAGGED
from tests.videos import prompt

VIDEOS = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision")


def chosen(x: Tensor, frames: int, rate: float) -> list[int]:
    """Raster indices of one video ``[T * tokens, D]``."""
    method = EVS(rate=rate)
    batch = images(len(x), 1, x=x[None], ordinal=torch.arange(len(x))[None], frames=frames)
    return method.select(batch, retained(frames, len(x) // frames, rate))[0].tolist()


def test_of_a_static_video_the_first_frame_stays() -> None:
    frame = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert chosen(frame.repeat(4, 1), 4, 0.9) == list(range(6))


def test_what_changes_in_a_frame_is_the_first_beyond_the_first_frame() -> None:
    frame = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    video = frame.repeat(4, 1)
    video[2 * 6 + 3] *= -1
    assert chosen(video, 4, 1 - 7 / 24) == [*range(6), 15]


@given(st.integers(1, 8), st.integers(1, 20), st.floats(0, 1))
def test_the_count(frames: int, tokens: int, rate: float) -> None:
    kept = retained(frames, tokens, rate)
    assert tokens <= kept <= frames * tokens
    assert kept == max(tokens, int(tokens * frames * (1 - rate)))


def test_a_place_that_was_empty_before_counts_as_changed() -> None:
    x = torch.ones(1, 3, 2)
    torch.testing.assert_close(dissimilarity(x, torch.tensor([[0, 3, 5]]), 3, 2), torch.tensor([[255.0, 255.0, 0.0]]))


def alive(session: Session) -> list[list[int]]:
    return [item.tolist() for item in session.trace.alive(1)[0]]


@pytest.mark.parametrize("family", VIDEOS)
def test_each_video_of_a_prompt_keeps_what_the_formula_says(family: str) -> None:
    model, side = BODIES[family].model(), 32
    videos = torch.randn(2, 4, 3, side, side, generator=torch.Generator().manual_seed(0))
    videos[1] = videos[1, :1]
    with attach(model, EVS(rate=0.6)) as session, torch.no_grad():
        model(**prompt(family, videos))
    tokens = 4 if family == "llava_onevision" else 16
    moving, still = alive(session)
    assert len(moving) == len(still) == int(4 * tokens * 0.4)
    assert moving[:tokens] == still[:tokens] == list(range(tokens))
    assert moving != still


def test_pictures_stay_whole() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with attach(model, EVS(rate=1.0)) as session, torch.no_grad():
        model(**body.inputs(RAGGED))
    assert [[len(item) for item in sample] for sample in session.trace.alive(1)] == [[16], [16, 16], [16]]
