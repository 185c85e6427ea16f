"""StreamingLLM: the card's worked example, places in the cache as positions, and streams."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import DynamicCache

import foveate
from foveate import FoveateError
from foveate.core.bounded import Held
from foveate.core.layout import Layout
from foveate.core.signal import Function
from foveate.engine.functions import function
from foveate.methods import StreamingLLM
from foveate.models import anatomy
from tests import tiny
from tests.methods.bodiless import layout
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits

INDEX = "streamingllm(keep=9, sinks=2, positions='index')"


def plan(method: StreamingLLM, prompts: Layout) -> list[list[list[int]]] | None:
    stored = torch.zeros(len(prompts.live), 1, prompts.shape[1], 4)
    (kept,) = method.plan([method.score(0, stored, stored, {}, prompts)], [prompts])
    return None if kept is None else kept.entries.tolist()


def test_the_worked_example() -> None:
    assert plan(StreamingLLM(keep=0.5), layout("t" * 12)) == [[[0, 1, 2, 3, 10, 11]]]


@pytest.mark.parametrize(("keep", "expected"), [(3, [0, 1, 7]), (1, [7]), (8, None), (100, None)])
def test_the_last_entry_stays_however_small_the_budget(keep: int, expected: list[int] | None) -> None:
    assert plan(StreamingLLM(keep=keep), layout("t" * 8)) == (None if expected is None else [[expected]])


def test_samples_of_different_length_are_padded_on_the_left() -> None:
    assert plan(StreamingLLM(keep=0.5, sinks=1), layout("t" * 8, "..t111..")) == [[[0, 5, 6, 7]], [[-1, -1, 2, 5]]]


def test_steps_evict_behind_the_first_entries_once_the_cache_is_full() -> None:
    counted, share = StreamingLLM(keep=10), StreamingLLM(keep=0.5)

    assert [counted.step(0, 7, held, 9, 8) for held in (8, 9, 10, 15)] == [None, None, 4, 4]
    assert share.step(0, 7, 7, 16, 14) == 4
    assert StreamingLLM(keep=1).step(0, 1, 1, 9, 8) == 0


@pytest.mark.parametrize("positions", ["original", "index"])
def test_the_cache_keeps_its_size_for_512_tokens(positions: str) -> None:
    model, ids = tiny.llava(grid=4), torch.tensor([[1, 20, *[tiny.IMAGE] * 16, *range(30, 40)]])
    with foveate.attach(model, f"streamingllm(keep=12, positions={positions!r})"):
        output = generate(model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 32, 32)}, 512)
    for layer in output.past_key_values.layers:
        held = layer.ledger.tokens(1, torch.device("cpu"))[0, 0].sort().values

        assert held.tolist() == [0, 1, 2, 3, *range(28 + 511 - 8, 28 + 511)]


def turned(model: Any, layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
    rotate, unrotate = (function(anatomy(model), Function(name, layer)) for name in ("rotate", "unrotate"))  # type: ignore[arg-type]
    moved: Tensor = rotate(unrotate(keys, old[None, None]), new[None, None])
    return moved


@torch.no_grad()
def test_by_index_an_answer_is_that_of_a_cache_whose_keys_stand_at_their_places() -> None:
    model, ids, token = tiny.llava(), torch.arange(20, 50)[None], torch.tensor([[60]])
    stays = torch.tensor([0, 1, *range(23, 30)])
    with foveate.attach(model, INDEX.replace(")", ", steps=False)")):
        cache = model(input_ids=ids, use_cache=True).past_key_values
        found = model(input_ids=token, past_key_values=cache).logits
    plain, short = model(input_ids=ids, use_cache=True).past_key_values, DynamicCache()
    for number, layer in enumerate(plain.layers):
        keys = turned(model, number, layer.keys[:, :, stays], stays, torch.arange(9))
        short.update(keys, layer.values[:, :, stays], number)
    expected = model(input_ids=token, past_key_values=short, position_ids=torch.tensor([[9]])).logits

    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_by_index_first_entries_move_up_with_every_step_and_turn() -> None:
    model, ids = tiny.llava(), torch.arange(20, 50)[None]
    plain = model(input_ids=ids, use_cache=True).past_key_values
    with foveate.attach(model, INDEX):
        first = generate(model, {"input_ids": ids}, 5)
        cache, said = first.past_key_values, torch.cat([first.sequences, torch.arange(30, 37)[None]], dim=1)
        generate(model, {"input_ids": said}, 4, past_key_values=cache)
    for number, (layer, before) in enumerate(zip(cache.layers, plain.layers)):
        gone = int(layer.get_seq_length()) - layer.keys.shape[2]
        expected = turned(model, number, before.keys[:, :, :2], torch.arange(2), torch.arange(2) + gone)

        assert layer.leading.by == (gone,)
        assert_close(layer.keys[:, :, :2], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("steps", [True, False])
def test_by_index_a_sample_gets_in_a_padded_batch_what_it_gets_alone(steps: bool) -> None:
    body = BODIES["llava-clip"]
    model, recipe = body.model(), INDEX.replace(")", f", steps={steps})")
    with foveate.attach(model, recipe):
        together = logits(generate(model, body.inputs(RAGGED), 8))
        beams = generate(model, body.inputs(RAGGED), 4, num_beams=2)
        assert len({layer.leading.by for layer in beams.past_key_values.layers}) == 1
        for place in range(len(RAGGED)):
            alone = logits(generate(model, body.inputs(RAGGED, only=place), 8))
            assert_close(alone[0], together[place], atol=1e-4, rtol=1e-4)


def held(count: int, prefix: int) -> Held:
    torch.manual_seed(0)
    return Held(torch.randn(1, 2, count, 2), torch.randn(1, 2, count, 2), torch.arange(count)[None] * 2, prefix)


@pytest.mark.parametrize(("prefix", "expected"), [(6, [0, 1, 2, 3, 4, 5, 15, 16, 17, 18, 19]), (1, [0, 1, 2, 3, 18, 19])])
def test_a_stream_keeps_its_prefix_first_entries_and_what_came_last(prefix: int, expected: list[int]) -> None:
    before = held(20, prefix)
    (left,) = StreamingLLM(keep=5).retain([before], lambda layer, keys, old, new: keys, None)

    assert torch.equal(left.values, before.values[:, :, expected])
    close = [*range(0, 2 * prefix, 2), *range(2 * prefix - 1, 2 * prefix - 1 + len(expected) - prefix)]
    assert left.positions[0].tolist() == close


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"streamingllm: positions='index': qwen2_vl has multi-row rotary positions"):
        foveate.attach(BODIES["qwen2_vl"].model(), INDEX)
    with pytest.raises(FoveateError, match=r"streamingllm: keep=0.5: a stream has no length to take a share of"):
        _ = StreamingLLM().capacity
