"""OmniZip: the card's worked examples and limiting cases, and a sound on its way to the method."""

from __future__ import annotations

import io
import math
import wave
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import WhisperFeatureExtractor

import foveate
from foveate.core.errors import FoveateError
from foveate.core.roles import Role
from foveate.methods.before_llm.omnizip_av import drop_rates, interleaved, kept_audio, peaks
from tests import tiny
from tests.suite.bodies import BODIES

RATE = 16_000


def test_the_audio_of_the_worked_example() -> None:
    importance = torch.tensor([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4, 0.5, 0.05])
    salient = {0, 2, 4, 6, 7, 8}

    assert set(kept_audio(importance, 0.4, 0.0).nonzero()[:, 0].tolist()) == salient
    assert set(kept_audio(importance, 0.4, 0.2).nonzero()[:, 0].tolist()) == salient | {1, 5}
    assert bool(kept_audio(importance, 0.0, 0.2).all())


@pytest.mark.parametrize(("share", "rate"), [(0.0, 0.75), (1.0, 0.35), (0.5, 0.55)])
def test_more_sound_is_less_loss(share: float, rate: float) -> None:
    assert drop_rates([share], [100], 0.6, 0.35, 0.75) == pytest.approx([rate])


@pytest.mark.parametrize(("discard", "expected"), [(0.6, [0.67, 0.697273, 0.602727, 0.43]), (0.7, [0.67, 0.75, 0.75, 0.43])])
def test_windows_share_a_budget_as_far_as_the_limits_allow(discard: float, expected: list[float]) -> None:
    assert drop_rates([0.2, 0.4, 0.6, 0.8], [100] * 4, discard, 0.35, 0.75) == pytest.approx(expected, abs=1e-6)


def test_two_windows_have_no_budget_to_share() -> None:
    assert drop_rates([0.2, 0.8], [100] * 2, 0.6, 0.35, 0.75) == pytest.approx([0.67, 0.43])


def test_density_peaks_of_the_worked_example() -> None:
    angle = torch.tensor([0.0, 10, 25, 120, 200]) * math.pi / 180
    scores = peaks(torch.stack([angle.cos(), angle.sin()], dim=1)[None], neighbours=2)

    assert_close(scores, torch.tensor([[0.0144, 1.9365, 0.0320, 0.4176, 0.2073]]), atol=1e-4, rtol=0)


def test_change_of_the_worked_example() -> None:
    before = torch.tensor([[1.0, 0], [0, 1], [1, 1], [1, 0]])
    now = torch.tensor([[1.0, 0], [1, 0], [1, 1], [1, 0.5]])

    assert_close(interleaved(torch.stack([before, now]), [0])[1], torch.tensor([-1.0, 0, -1, -0.8944]), atol=1e-4, rtol=0)


def test_each_window_begins_with_its_peaks() -> None:
    video = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(0))
    scores = interleaved(video, [0, 3])

    for frame in (0, 2, 3):
        assert_close(scores[frame], peaks(video[frame][None])[0])
    for frame in (1, 4):
        assert_close(scores[frame], -torch.cosine_similarity(video[frame], video[frame - 1], dim=-1))


def recording(seconds: float) -> bytes:
    """A WAV file that is quiet in its first half and loud in its second."""
    time = np.arange(int(seconds * RATE)) / RATE
    swell = np.where(time < seconds / 2, 0.01, 0.5) * (1 + 0.5 * np.sin(2 * np.pi * time))
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(RATE)
        out.writeframes((swell * np.sin(2 * np.pi * 440 * time) * 20_000).astype("<i2").tobytes())
    return file.getvalue()


def loudness(file: bytes) -> np.ndarray:
    """One number for each 40 ms."""
    with wave.open(io.BytesIO(file)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2").astype(np.float32)
    return np.sqrt((samples.reshape(-1, RATE // 25) ** 2).mean(1))


def of_video(steps: int) -> dict[str, Any]:
    """A prompt with a video of ``steps`` steps of 16 tokens."""
    ids = torch.tensor([[1, 20, *[tiny.VIDEO] * 16 * steps, 30, 31]])
    return {
        "input_ids": ids,
        "pixel_values_videos": torch.randn(steps * 64, 48, generator=torch.Generator().manual_seed(0)),
        "video_grid_thw": torch.tensor([[steps, 8, 8]]),
        "mm_token_type_ids": (ids == tiny.VIDEO) * 2,
    }


def with_sound(steps: int, file: bytes) -> dict[str, Any]:
    """A prompt with a video and, behind it, its sound, for a model that listens."""
    with wave.open(io.BytesIO(file)) as sound:
        samples = np.frombuffer(sound.readframes(sound.getnframes()), dtype="<i2") / 32768
    extractor = WhisperFeatureExtractor(feature_size=16, sampling_rate=RATE)
    heard = extractor(samples, sampling_rate=RATE, padding=False, return_attention_mask=True, return_tensors="pt")
    count = ((heard["input_features"].shape[2] - 1) // 2 + 1 - 2) // 2 + 1
    ids = torch.tensor([[1, 20, 8, *[tiny.VIDEO] * 16 * steps, 9, 4, *[tiny.AUDIO] * count, 5, 30, 31]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": of_video(steps)["pixel_values_videos"],
        "video_grid_thw": torch.tensor([[steps, 8, 8]]),
        "video_second_per_grid": torch.ones(1),
        "input_features": heard["input_features"],
        "feature_attention_mask": heard["attention_mask"],
    }


def by_step(kept: Tensor, steps: int) -> list[int]:
    return (kept // 16).bincount(minlength=steps).tolist()


@torch.no_grad()
def test_what_is_loud_is_seen_better() -> None:
    sound = loudness(recording(4.0))
    model, recipe = BODIES["qwen2_vl"].model(), "omnizip_av(audio=0.5, context=0.0)"
    with foveate.attach(model, recipe) as session, session.side(videos={"audio": [sound]}):
        model.generate(**of_video(4), max_new_tokens=2, do_sample=False)
    ((kept,),) = session.trace.alive(0)

    # All of the sound that counts is in the second half: 75 and 35 % are dropped.
    assert len(sound) == 100
    assert by_step(kept, 4) == [4, 4, 10, 10]


@torch.no_grad()
def test_a_model_that_listens_gets_all_of_the_sound_and_less_of_the_video() -> None:
    file = recording(4.0)
    model, inputs = tiny.qwen2_5_omni(), with_sound(4, file)
    recipe = "omnizip_av(audio=0.5, context=0.0)"
    with foveate.attach(model, recipe) as session, session.side(videos={"audio": [loudness(file)]}):
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    layout = session.trace.log[-1][0]

    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2
    assert by_step(session.trace.alive(0)[0][0], 4) == [4, 4, 10, 10]
    assert int((layout.role == Role.AUDIO).sum()) == 100
    assert layout.question[0].nonzero()[:, 0].tolist() == [31, 32, 133, 134, 135]  # what is heard asks nothing


@torch.no_grad()
def test_a_video_without_sound_stays_whole_and_is_named() -> None:
    with foveate.attach(BODIES["qwen2_vl"].model(), "omnizip_av") as session:
        session.anatomy.model(**of_video(2))

    assert session.report.visual_tokens[0] == 32
    assert session.report.idle == ("omnizip_av",)


def test_too_little_sound_is_refused() -> None:
    refused = pytest.raises(FoveateError, match=r"omnizip_av: audio=\(1,\): must be \[n\] of each video, .* its 2 windows")
    model = BODIES["qwen2_vl"].model()
    with foveate.attach(model, "omnizip_av") as session, session.side(videos={"audio": torch.ones(1)}), refused:
        model(**of_video(4))


def test_it_needs_whole_grids() -> None:
    with pytest.raises(FoveateError, match=r"random \+ omnizip_av: omnizip_av needs whole grids"):
        foveate.attach(BODIES["qwen2_vl"].model(), "random(keep=6) + omnizip_av")
