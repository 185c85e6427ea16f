"""Encoder blocks that run in part: what comes out, what is saved, and what goes on from call to call."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.reuse import Reuse
from foveate.core.stream import Memory
from foveate.core.traits import Traits
from foveate.engine.call import LOOK
from foveate.engine.session import Session
from foveate.models import anatomy
from tests import tiny, videos
from tests.suite.bodies import BODIES

ROWS = 16
"""Of a frame in the tiny encoders."""
PICTURES = [name for name, body in BODIES.items() if anatomy(body.model()).traits().reuses]


@dataclass(frozen=True)
class Part(Reuse):
    """Runs the ``k`` rows whose keys changed most, of all frames but every ``every``-th."""

    name = "part"
    k: int = 3
    every: int = 2

    def reused(self, traits: Traits) -> tuple[int, ...]:
        return tuple(range((traits.feature_layer or 0) + 1))

    def reference(self, frame: int) -> int:
        return frame - frame % self.every

    def stale(self, layer: int, keys: Tensor, reference: Tensor) -> Tensor:
        return cosine_similarity(keys, reference, dim=2).argsort(1)[:, : self.k]


def film(frames: int, count: int = 1, change: float = 0.05, seed: int = 0) -> Tensor:
    """Videos ``[V, T, 3, 32, 32]`` in which each frame differs a little from the one before."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(count, 1, 3, 32, 32, generator=generator)
    return first + change * torch.randn(count, frames, 3, 32, 32, generator=generator).cumsum(1)


def encoded(model: Any, video: Tensor) -> Tensor:
    """``[V, T, 4, D]`` tokens, without the line ends."""
    made: Tensor = model.model.get_video_features(video).pooler_output
    return made[:, :-1].unflatten(1, (video.shape[1], -1))


def streamed(session: Session, model: Any, video: Tensor, cuts: Sequence[int], memory: Memory) -> Tensor:
    """The tokens of one video that comes in several calls."""
    with session.streaming(memory):
        return torch.cat([encoded(model, part) for part in video.split(list(cuts), dim=1)], dim=1)


def by_hand(model: Any, video: Tensor, method: Part) -> Tensor:
    """The tower's features ``[T, n, D]`` of one video, frame by frame and block by block."""
    tower, frames = model.model.vision_tower, []
    inner = getattr(tower, "vision_model", tower)
    x = inner.embeddings(video[0])
    for block in inner.encoder.layers[: anatomy(model).traits().feature_layer + 1]:
        attention, frames, held = block.self_attn, [], None
        for number, frame in enumerate(x):
            h = block.layer_norm1(frame)
            key, heads = attention.k_proj(h), attention.num_heads
            if number % method.every == 0:
                rows = torch.arange(len(h))
                value, attended, mixed = attention.v_proj(h), torch.zeros_like(h), torch.zeros_like(h)
            else:
                assert held is not None
                rows = cosine_similarity(key, held[0], dim=1).argsort()[: method.k]
                value, attended, mixed = (each.clone() for each in held[1:])
                value[rows] = attention.v_proj(h[rows])
            q, k, v = (each.unflatten(1, (heads, -1)).transpose(0, 1) for each in (attention.q_proj(h[rows]), key, value))
            weights = (q @ k.mT * attention.scale).softmax(2)
            attended[rows] = attention.out_proj((weights @ v).transpose(0, 1).flatten(1))
            y = frame + attended
            mixed[rows] = block.mlp(block.layer_norm2(y[rows]))
            frames.append(y + mixed)
            if number % method.every == 0:
                held = key, value, attended, mixed
        x = torch.stack(frames)
    return x


@contextmanager
def counted(model: Any) -> Iterator[Counter[str]]:
    """Rows that pass through each kind of part of the encoder's blocks."""
    rows: Counter[str] = Counter()
    hooks = []
    for layer, block in enumerate(anatomy(model).encoder.blocks):  # type: ignore[union-attr]
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp"):

            def count(module: Any, args: Any, name: str = f"{layer}.{name}") -> None:
                rows[name] += args[0].shape[:-1].numel()

            hooks.append(block.get_submodule(name).register_forward_pre_hook(count))
    try:
        yield rows
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def test_a_block_is_what_it_is_by_hand() -> None:
    model, video, method = tiny.llava_onevision().double(), film(5).double(), Part(every=3)
    with foveate.attach(model, method):
        found = encoded(model, video)
    features = by_hand(model, video, method)
    expected = model.model.apply_pooling(model.model.multi_modal_projector(features))

    assert_close(found[0], expected)
    assert (found[0] - encoded(model, video)[0]).abs().max() > 1e-3


def test_rows_that_do_not_run_are_never_computed() -> None:
    model, video = tiny.llava_onevision(), film(5)
    with foveate.attach(model, Part(k=3)), counted(model) as rows:
        encoded(model, video)
    for layer in range(anatomy(model).traits().feature_layer + 1):  # type: ignore[operator]
        assert rows.pop(f"{layer}.self_attn.k_proj") == 5 * ROWS
        for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp"):
            assert rows.pop(f"{layer}.{name}") == 3 * ROWS + 2 * 3
    assert set(rows.values()) <= {5 * ROWS}  # of blocks that reach nothing


@pytest.mark.parametrize("cuts", [(1, 1, 1, 1, 1), (2, 3), (3, 2), (4, 1)])
def test_a_stream_is_what_it_is_in_one_call(cuts: tuple[int, ...]) -> None:
    model, video, memory = tiny.llava_onevision(), film(5), Memory()
    with foveate.attach(model, Part(every=3)) as session:
        assert_close(streamed(session, model, video, cuts, memory), encoded(model, video))
    blocks, width = anatomy(model).traits().feature_layer + 1, anatomy(model).encoder.width  # type: ignore[operator, union-attr]
    assert memory.nbytes == blocks * 4 * ROWS * width * 4


def test_videos_of_one_call_do_not_know_each_other() -> None:
    model, both = tiny.llava_onevision(), film(4, count=2)
    with foveate.attach(model, Part()):
        together = encoded(model, both)
        for video, found in zip(both, together):
            assert_close(encoded(model, video[None])[0], found)


def test_two_videos_are_no_stream() -> None:
    model = tiny.llava_onevision()
    with foveate.attach(model, Part()) as session, session.streaming(Memory()):
        with pytest.raises(FoveateError, match=r"^streaming: a call that encodes 2 videos; give it one"):
            encoded(model, film(2, count=2))
        encoded(model, film(2))


def test_a_call_that_dies_leaves_the_stream_as_it_was() -> None:
    model, video, memory = tiny.llava_onevision(), film(4), Memory()
    with foveate.attach(model, Part(every=4)) as session:
        plain = encoded(model, video)
        first = streamed(session, model, video[:, :2], (2,), memory)

        def stop(*_: Any) -> None:
            raise KeyboardInterrupt

        hook = model.model.multi_modal_projector.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            streamed(session, model, film(2, seed=1), (2,), memory)
        hook.remove()
        rest = streamed(session, model, video[:, 2:], (1, 1), memory)

    assert_close(torch.cat([first, rest], dim=1), plain)


def test_features_that_are_kept_hold_nothing_of_the_stream() -> None:
    model, memory = tiny.llava_onevision(), Memory()
    with foveate.attach(model, Part()) as session, session.streaming(memory):
        output = model.model.get_video_features(film(1))
    assert memory.nbytes > 0
    assert getattr(output, LOOK).memory.nbytes == 0


def test_each_thread_has_its_own_stream() -> None:
    model, films = tiny.llava_onevision(), [film(6, seed=seed) for seed in range(4)]
    with foveate.attach(model, Part(every=3)) as session:
        alone = [encoded(model, video) for video in films]
        with ThreadPoolExecutor(4) as pool:
            found = list(pool.map(lambda video: streamed(session, model, video, [1] * 6, Memory()), films))
        outside = encoded(model, films[0])

    for one, other in zip(alone, found):
        assert_close(one, other)
    assert_close(outside, alone[0])


def test_a_stream_belongs_to_one_session_until_it_is_reset() -> None:
    model, memory = tiny.llava_onevision(), Memory()
    with foveate.attach(model, Part()) as session:
        streamed(session, model, film(1), (1,), memory)
    with foveate.attach(model, Part()) as session:
        with pytest.raises(FoveateError, match=r"^memory: holds a stream that another session encoded"):
            session.streaming(memory)
        memory.reset()
        plain = encoded(model, film(2))
        assert_close(streamed(session, model, film(2), (1, 1), memory), plain)


def test_frames_of_another_size_begin_anew() -> None:
    model = BODIES["idefics3"].model()
    small, large = torch.randn(1, 2, 3, 64, 64), torch.randn(1, 1, 3, 128, 128)
    with foveate.attach(model, Part(every=4)) as session, session.streaming(Memory()):
        model.model.get_image_features(small)
        resized = model.model.get_image_features(large).pooler_output
    assert_close(resized, model.model.get_image_features(large).pooler_output)


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_of_a_stream_are_its_frames(name: str) -> None:
    body = BODIES[name]
    model, inputs = body.model(), body.inputs([(3, 1, 6)])
    plain = model(**inputs).logits
    with foveate.attach(model, Part()) as session:
        assert torch.equal(model(**inputs).logits, plain)  # without a stream, each picture is alone
        memory = Memory()
        with session.streaming(memory):
            model(**inputs)
            assert memory.nbytes > 0
            again = model(**inputs).logits  # the same picture: all that is taken from it is right
        assert str(session.report.idle) == "()"
    assert_close(again, plain)


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_changed_all_over_is_what_it_is_alone(name: str) -> None:
    body = BODIES[name]
    model, first, second = body.model(), body.inputs([(3, 1, 6)]), body.inputs([(3, 1, 6)], seed=1)
    with foveate.attach(model, Part(k=1000)) as session, session.streaming(Memory()):  # all rows that there are
        model(**first)
        found = model(**second).logits
    assert_close(found, model(**second).logits)


def test_padding_within_a_tile_stays_masked() -> None:
    body = BODIES["idefics3"]
    model, inputs = body.model(), body.inputs([(3, 1, 6)])
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][..., 40:, :] = 0
    plain = model(**inputs).logits
    with foveate.attach(model, Part()) as session, session.streaming(Memory()):
        model(**inputs)
        again = model(**inputs).logits
    assert_close(again, plain)
    whole = body.inputs([(3, 1, 6)])
    assert (model(**whole).logits - plain).abs().max() > 1e-4


def test_every_attention_kernel_gives_the_same() -> None:
    video, found = film(4), []
    for kernel in ("sdpa", "eager"):
        model = tiny.llava_onevision(attention=kernel)
        with foveate.attach(model, Part()):
            found.append(encoded(model, video))
    assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_block_whose_attention_is_read_runs_whole() -> None:
    model, inputs = tiny.llava_onevision(), videos.prompt("llava_onevision", film(4))
    recipe = foveate.Recipe.of([Part(), "duet_vlm(dominant=6, contextual=3, place='embeddings')"])
    with foveate.attach(model, recipe) as session, counted(model) as rows:
        model(**inputs)
    (read,) = session._program.encoder_signals
    assert rows[f"{read}.mlp"] == 4 * ROWS
    assert rows["0.mlp"] == 2 * ROWS + 2 * 3


def test_what_drops_rows_in_the_encoder_is_refused_beside_it() -> None:
    with pytest.raises(FoveateError, match=r"^part \+ pixelprune: pixelprune drops rows at patches, where part needs"):
        foveate.attach(BODIES["llava-clip"].model(), foveate.Recipe.of([Part(), "pixelprune"]))
    with pytest.raises(FoveateError, match=r"^part \+ part: both let encoder blocks run in part"):
        foveate.attach(BODIES["llava-clip"].model(), foveate.Recipe.of([Part(), Part(k=4)]))


def test_packed_encoders_and_blocks_in_other_hands_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"^part: encoder block in part 0: qwen2_vl offers none"):
        foveate.attach(BODIES["qwen2_vl"].model(), Part())
    model = tiny.llava_onevision()
    block = anatomy(model).encoder.blocks[0]  # type: ignore[union-attr]
    block.forward = lambda *args, **kwargs: type(block).forward(block, *args, **kwargs)
    with pytest.raises(FoveateError, match=r"something else stands in for its forward, so its rows cannot run in part$"):
        foveate.attach(model, Part())
