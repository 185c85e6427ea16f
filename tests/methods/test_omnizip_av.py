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

    found, anchors = kept_audio(importance, 0.4, 0.2)

    assert set(found.nonzero()[:, 0].tolist()) == salient
    assert anchors.tolist() == [1, 5]
    assert kept_audio(importance, 0.4, 0.0)[1].tolist() == []
    assert bool(kept_audio(importance, 0.0, 0.2)[0].all())


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
def test_a_model_that_listens_gets_the_sound_that_counts_and_less_of_the_video() -> None:
    file = recording(4.0)
    model, inputs = tiny.qwen2_5_omni(), with_sound(4, file)
    recipe = "omnizip_av(audio=0.5, context=0.0)"
    with foveate.attach(model, recipe) as session, session.side(videos={"audio": [loudness(file)]}):
        answer = model.generate(**inputs, max_new_tokens=2, do_sample=False)
    layout = session.trace.log[-1][0]

    assert answer.shape[1] == inputs["input_ids"].shape[1] + 2
    assert by_step(session.trace.alive(0)[0][0], 4) == [4, 4, 10, 10]
    assert layout.origin[layout.role == Role.AUDIO].tolist() == list(range(69 + 50, 69 + 100))  # the loud half
    assert layout.question[0].nonzero()[:, 0].tolist() == [31, 32, 83, 84, 85]  # what is heard asks nothing


def heard_by(model: Any, inputs: dict[str, Any]) -> Tensor:
    """What each token of sound gets, of one sound: from queries and keys of the last block, and no mask."""
    block = model.model.audio_tower.layers[-1].self_attn
    made: list[Tensor] = []
    hooks = [part.register_forward_hook(lambda module, args, out: made.append(out)) for part in (block.q_proj, block.k_proj)]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    query, key = (part.unflatten(1, (block.num_heads, -1)).transpose(0, 1) for part in made)
    got = (query @ key.mT * block.scaling).softmax(-1).mean((0, 1))
    return got[: len(got) // 2 * 2].reshape(-1, 2).mean(1)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.no_grad()
def test_what_the_encoder_attends_to_says_what_counts(attention: str) -> None:
    model, inputs = tiny.qwen2_5_omni(attention=attention), with_sound(4, recording(4.0))
    expected = heard_by(model, inputs)
    with foveate.attach(model, "omnizip_av(audio=0.4, members=0)") as session:
        model(**inputs)
    layout = session.trace.log[-1][0]
    kept = layout.origin[layout.role == Role.AUDIO] - 69

    assert len(expected) == 100
    assert kept.tolist() == expected.topk(60).indices.sort().values.tolist()
    assert "_foveate_tap" not in model.model.audio_tower.layers[-1].self_attn.__dict__


@torch.no_grad()
def test_anchors_take_in_what_goes() -> None:
    model, inputs = tiny.qwen2_5_omni(), with_sound(4, recording(4.0))
    with foveate.attach(model, "omnizip_av(audio=0.4, context=0.05)") as session:
        model(**inputs)
    layout = session.trace.log[-1][0]
    size = layout.size[layout.role == Role.AUDIO]

    assert len(size) == 65
    assert int((size > 1).sum()) <= 5
    assert 65 < float(size.sum()) <= 65 + 5 * 3


@torch.no_grad()
def test_nothing_is_lost_where_everything_counts() -> None:
    model, inputs = tiny.qwen2_5_omni(), with_sound(2, recording(2.0))
    plain = model(**inputs).logits
    with foveate.attach(model, "omnizip_av(audio=0.0, video=0.0, low=0.0, high=0.0)"):
        assert_close(model(**inputs).logits, plain)


@torch.no_grad()
def test_turns_of_video_and_sound_are_windows() -> None:
    model, inputs = tiny.qwen2_5_omni(), with_sound(4, recording(4.0))
    turn = [*[tiny.VIDEO] * 32, *[tiny.AUDIO] * 50]
    ids = torch.tensor([[1, 20, 8, *turn, *turn, 5, 30, 31]])
    positions = torch.arange(ids.shape[1]).expand(3, 1, -1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    importance = torch.cat([torch.arange(50.0) - 100, torch.arange(50.0)])
    recipe = "omnizip_av(audio=0.5, members=0, steps=1)"
    with foveate.attach(model, recipe) as session, session.side(videos={"audio": importance}):
        model(**inputs)
    layout = session.trace.log[-1][0]

    assert by_step(session.trace.alive(0)[0][0], 4) == [4, 4, 10, 10]
    assert layout.origin[layout.role == Role.AUDIO].tolist() == list(range(3 + 82 + 32, 3 + 164))


@torch.no_grad()
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone() -> None:
    model, samples = tiny.qwen2_5_omni(), [with_sound(4, recording(4.0)), with_sound(2, recording(2.0))]
    origins = []
    for sample in samples:
        with foveate.attach(model, "omnizip_av") as session:
            model(**sample)
        origins.append(session.trace.log[-1][0].origin[0])
    width = samples[0]["input_ids"].shape[1]
    shift = width - samples[1]["input_ids"].shape[1]

    def padded(name: str, behind: int = 0) -> Tensor:
        first, second = samples[0][name], samples[1][name]
        more = first.shape[-1] - second.shape[-1]
        return torch.cat([first, torch.nn.functional.pad(second, (0, more) if behind else (more, 0))])

    both = {name: padded(name) for name in ("input_ids", "attention_mask")}
    both |= {name: padded(name, behind=1) for name in ("input_features", "feature_attention_mask")}
    both |= {
        name: torch.cat([sample[name] for sample in samples])
        for name in ("pixel_values_videos", "video_grid_thw", "video_second_per_grid")
    }
    with foveate.attach(model, "omnizip_av") as session:
        model(**both)
    layout = session.trace.log[-1][0]

    assert layout.origin[0][layout.valid[0]].tolist() == origins[0].tolist()
    assert (layout.origin[1][layout.valid[1]] - shift).tolist() == origins[1].tolist()


@torch.no_grad()
def test_sound_that_predicts_the_next_token_stays() -> None:
    model, inputs = tiny.qwen2_5_omni(), with_sound(2, recording(2.0))
    inputs["input_ids"], inputs["attention_mask"] = (inputs[name][:, :-3] for name in ("input_ids", "attention_mask"))
    inputs["position_ids"] = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
    with foveate.attach(model, "omnizip_av(audio=1.0, members=0)") as session:
        model(**inputs)
    layout = session.trace.log[-1][0]

    assert layout.origin[layout.role == Role.AUDIO].tolist() == [inputs["input_ids"].shape[1] - 1]


@torch.no_grad()
def test_sound_of_another_length_than_the_prompts_is_refused() -> None:
    model, inputs = tiny.qwen2_5_omni(), with_sound(2, recording(2.0))
    refused = pytest.raises(
        FoveateError, match=r"omnizip_av: audio=\(7,\): must be a number for each of the 50 tokens of sound"
    )
    with foveate.attach(model, "omnizip_av") as session, session.side(videos={"audio": torch.ones(7)}), refused:
        model(**inputs)


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
