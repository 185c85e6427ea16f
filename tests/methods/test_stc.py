"""STC: the card's examples and invariants, videos of whole models, and streams."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.core.stream import Memory
from foveate.engine.grids import picture_layout
from foveate.engine.session import Session
from foveate.methods import STC
from foveate.methods.in_encoder.stc import familiarity, gaussian, most_changed, novelty
from tests import tiny
from tests.methods.bodiless import traits
from tests.suite.bodies import BODIES
from tests.suite.conversation import generate
from tests.videos import prompt

EXAMPLE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
CLOSE = dict(atol=1e-4, rtol=0)


def film(frames: int, count: int = 1, change: float = 0.05, seed: int = 0) -> Tensor:
    """Videos ``[V, T, 3, 32, 32]`` in which each frame differs a little from the one before."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 1, 3, 32, 32, generator=generator)
    return first + change * torch.randn(count, frames, 3, 32, 32, generator=generator).cumsum(1)


def encoded(model: Any, video: Tensor) -> Tensor:
    """``[V, T, 4, D]`` tokens, without the line ends; those that go are zero."""
    made: Tensor = model.model.get_video_features(video).pooler_output
    return made[:, :-1].unflatten(1, (video.shape[1], -1))


def kept(method: STC, z: Tensor, memory: Memory | None = None) -> list[list[int]]:
    """Of a video ``[F, P, d]`` the tokens of each frame that stay."""
    frames, tokens, width = z.shape
    layout = picture_layout([(frames * tokens, 1, frames)], torch.ones(1, frames * tokens, dtype=torch.bool), 0)
    edit = method.edit(Site("projected"), z.reshape(1, -1, width), layout, {}, State(memory=memory))
    anchor = torch.arange(frames * tokens) if edit is None else edit.reduction.anchor[0]
    return [(anchor[anchor // tokens == frame] % tokens).tolist() for frame in range(frames)]


def streamed(method: STC, z: Tensor, cuts: Sequence[int]) -> list[list[int]]:
    memory, found = Memory(), []
    for part in z.split(list(cuts)):
        found += kept(method, part, memory)
    return found


# The pruner.


@pytest.mark.parametrize(
    ("alpha", "scores"),
    [(0.0, [0.1056, 0.1056, 0.5528]), (0.5, [0.0528, 0.0528, 0.7764]), (1.0, [0.0, 0.0, 1.0])],
)
def test_the_cards_example(alpha: float, scores: list[float]) -> None:
    found, (total, count) = novelty(EXAMPLE[None, None], (torch.tensor([[1.0, 0.0]]), 1), alpha)

    assert_close(found[0, 0], torch.tensor(scores), **CLOSE)
    assert_close(total, torch.tensor([[1 + 2 / 3, 1 / 3]]))
    assert count == 2


def test_the_cards_example_of_the_published_code() -> None:
    mean = EXAMPLE.mean(0)
    history = torch.nn.functional.normalize(torch.tensor([1.0, 0.0]) + mean, dim=0)
    assert_close(gaussian(EXAMPLE, mean), torch.tensor([3.6938, 3.6938, 2.0506]), **CLOSE)
    assert_close(gaussian(EXAMPLE, history), torch.tensor([4.7144, 4.7144, 1.3587]), **CLOSE)

    found, _ = familiarity(EXAMPLE[None, None, None], (torch.tensor([[1.0, 0.0]]), 1), select=False)
    assert_close(found[0, 0, 0], torch.tensor([8.4082, 8.4082, 3.4093]), **CLOSE)


def test_a_frame_without_a_history_is_compared_with_itself_alone() -> None:
    z = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    assert torch.equal(novelty(z, None, alpha=1.0)[0], novelty(z, None, alpha=0.0)[0])


def test_each_frame_is_compared_with_all_before_it_or_with_the_last_few() -> None:
    z = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0))
    means = z.mean(2)
    for window, last in ((None, 5), (2, 2), (9, 9)):
        found, _ = novelty(z, None, 1.0, window)
        for frame in range(1, 5):
            history = means[:, max(frame - last, 0) : frame].mean(1)
            expected = 1 - torch.cosine_similarity(z[:, frame], history[:, None], dim=2)
            assert_close(found[:, frame], expected)


@given(st.integers(1, 6), st.integers(1, 8), st.integers(1, 10), st.sampled_from(["paper", "released"]), st.integers(1, 3))
def test_exactly_k_tokens_of_each_frame_stay_in_order(frames: int, tokens: int, keep: int, variant: Any, chunk: int) -> None:
    z = torch.randn(frames, tokens, 4, generator=torch.Generator().manual_seed(0))
    for found in kept(STC(keep=keep, variant=variant, chunk=chunk), z):
        assert len(found) == min(keep, tokens)
        assert found == sorted(set(found))


@given(st.integers(1, 6), st.integers(0, 6), st.integers(1, 3), st.none() | st.integers(1, 3))
def test_no_later_frame_has_a_say(frames: int, more: int, chunk: int, window: int | None) -> None:
    z = torch.randn(frames + more, 6, 4, generator=torch.Generator().manual_seed(0))
    paper = STC(keep=2, chunk=chunk, window=window)
    assert kept(paper, z)[:frames] == kept(paper, z[:frames])
    released = STC(keep=2, variant="released", chunk=chunk)
    there = frames - frames % chunk  # a chunk comes as a whole
    assert kept(released, z)[:there] == kept(released, z[:frames])[:there]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.none() | st.integers(1, 3))
def test_a_stream_is_what_it_is_in_one_call(cuts: list[int], window: int | None) -> None:
    z = torch.randn(sum(cuts), 6, 4, generator=torch.Generator().manual_seed(0))
    for method in (STC(keep=2, window=window), STC(keep=2, variant="released")):
        assert streamed(method, z, cuts) == kept(method, z)


def test_what_comes_back_is_not_new() -> None:
    """A token that earlier frames were full of goes, though nothing else in its own frame is like it."""
    z = torch.tensor([[[1.0, 0.0]] * 4, [[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]])
    assert kept(STC(keep=1, alpha=0.0), z)[1] == [0]
    assert kept(STC(keep=1, alpha=1.0), z)[1] == [1]


# The cacher.


def test_references_are_the_last_frames_of_whole_chunks() -> None:
    assert [STC().reference(frame) for frame in range(6)] == [0, 0, 2, 2, 4, 4]
    assert [STC(interval=3, chunk=2).reference(frame) for frame in range(8)] == [0, 1, 1, 1, 1, 1, 6, 7]
    assert [STC(interval=1, chunk=2).reference(frame) for frame in range(4)] == [0, 1, 2, 3]


def test_rows_that_changed_most_run() -> None:
    keys = torch.eye(4)[None]
    changed = keys.clone()
    changed[0, 2] = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert most_changed(changed, keys, 0.25).tolist() == [[2]]
    assert most_changed(changed, keys, 0.0).tolist() == [[2]]
    assert most_changed(changed, keys, 0.74).tolist() == [[0, 2]]  # early ones first among equals
    assert most_changed(changed, keys, 1.0).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("method", [STC(keep=1.0, update=1.0), STC(keep=1.0, interval=1)], ids=str)
def test_without_reuse_the_encoder_is_what_it_was(method: STC) -> None:
    model, video = tiny.llava_onevision(), film(5)
    plain = encoded(model, video)
    with foveate.attach(model, method):
        assert torch.equal(encoded(model, video), plain)


@pytest.mark.parametrize("update", [0.0, 0.25, 0.7, 0.99])
def test_a_still_is_what_it_was_whatever_runs(update: float) -> None:
    model, video = tiny.llava_onevision(), film(1).repeat(1, 5, 1, 1, 1)
    plain = encoded(model, video)
    with foveate.attach(model, STC(keep=1.0, update=update)):
        assert_close(encoded(model, video), plain)


def test_a_patch_that_changes_runs_in_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    model, video = tiny.llava_onevision(), film(1).repeat(1, 2, 1, 1, 1)
    side = 4  # cells of a frame, of 8 pixels each
    video[0, 1, :, 8:16, 16:24] += 1.0
    chosen: dict[int, list[int]] = {}

    def spied(self: STC, layer: int, keys: Tensor, reference: Tensor) -> Tensor:
        rows = most_changed(keys, reference, self.update)
        chosen[layer] = rows[0].tolist()
        return rows

    monkeypatch.setattr(STC, "stale", spied)
    with foveate.attach(model, STC(keep=1.0, update=0.0)):
        encoded(model, video)
    assert chosen[0] == [1 * side + 2]


# Both, in whole models.


def alive(session: Session) -> list[list[int]]:
    return [item.tolist() for item in session.trace.alive(1)[0]]


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_video_keeps_so_many_tokens_of_each_frame(family: str) -> None:
    interval = 2 if family == "llava_onevision" else 1
    model, inputs = BODIES[family].model(), prompt(family, film(4, count=2))
    for keep, of_four, of_sixteen in ((1, 1, 1), (3, 3, 3), (0.5, 2, 8)):
        with foveate.attach(model, STC(keep=keep, interval=interval)) as session:
            generate(model, inputs, 2)
        frames = [len(items) for items in alive(session)]
        each = of_four if family == "llava_onevision" else of_sixteen
        assert sum(frames) == 2 * 4 * each, frames
        assert session.report.idle == ()


def test_no_later_frame_changes_what_an_earlier_one_became() -> None:
    model, video = tiny.llava_onevision(), film(6)
    with foveate.attach(model, STC(keep=2)):
        whole = encoded(model, video)
        for frames in range(1, 6):
            assert_close(encoded(model, video[:, :frames]), whole[:, :frames])


def test_a_stream_of_single_frames_is_the_video() -> None:
    model, video = tiny.llava_onevision(), film(6)
    for method in (STC(keep=2), STC(keep=2, variant="released", interval=3), STC(keep=2, window=2, chunk=2)):
        memory, found = Memory(), []
        with foveate.attach(model, method) as session:
            whole = encoded(model, video)
            with session.streaming(memory):
                found = [encoded(model, frame) for frame in video.split(1, dim=1)]
        assert_close(torch.cat(found, dim=1), whole)


def test_pictures_are_alone_unless_a_stream_is_open() -> None:
    body = BODIES["llava-siglip"]
    model, both = body.model(), body.inputs([(3, 2, 6)])
    with foveate.attach(model, STC(keep=5)) as session:
        together = model.model.get_image_features(both["pixel_values"]).pooler_output
        alone = [model.model.get_image_features(each[None]).pooler_output[0] for each in both["pixel_values"]]
        with session.streaming(Memory()):
            stream = model.model.get_image_features(both["pixel_values"]).pooler_output
    for one, other in zip(together, alone):
        assert_close(one, other)
    assert torch.equal(stream[0], together[0])
    assert not torch.equal(stream[1], together[1])


def test_packed_encoders_have_the_pruner_only() -> None:
    model = BODIES["qwen2_vl"].model()
    refused = r"^stc: interval=2: needs an encoder that takes each frame by itself .* qwen2_vl .*; use interval=1"
    with pytest.raises(FoveateError, match=refused):
        foveate.attach(model, STC())
    foveate.attach(model, STC(interval=1)).detach()
    assert STC().reused(traits(feature_layer=2)) == (0, 1, 2)
    assert STC(update=1.0).reused(traits(feature_layer=2)) == ()


def test_whole_frames_are_asked_for() -> None:
    model = BODIES["llava-clip"].model()
    with pytest.raises(FoveateError, match=r"^prumerge \+ stc: stc needs whole grids, and prumerge drops tokens before it"):
        foveate.attach(model, "prumerge(keep=6) + stc(keep=4)")
    foveate.attach(model, "stc(keep=8) + fastv(keep=4)").detach()
