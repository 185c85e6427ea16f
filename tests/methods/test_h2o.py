"""H2O: the card's worked example, and steps of decoding against the algorithm entry by entry."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate import FoveateError
from foveate.core.layout import Layout
from foveate.core.signal import Columns, Site
from foveate.core.tally import Tally
from foveate.methods import H2O
from foveate.methods.kv_cache.h2o import summed
from foveate.ops.attention import columns
from tests import tiny
from tests.methods.bodiless import layout, traits
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits

MAP = torch.tensor([[1.0, 0, 0, 0], [0.6, 0.4, 0, 0], [0.5, 0.1, 0.4, 0], [0.4, 0.1, 0.2, 0.3]])
MEANS = torch.tensor([0.625, 0.2, 0.3, 0.3])


def plan(method: H2O, means: Tensor, prompts: Layout) -> list[list[list[int]]] | None:
    """Entries kept by head, given ``means`` ``[B, Hkv, n]`` over queries."""
    stored = torch.zeros(*means.shape, 4)
    score = method.score(0, stored, stored, {Columns(Site("decoder"), by_head=True): means.transpose(1, 2)}, prompts)
    (kept,) = method.plan([score], [prompts])
    return None if kept is None else kept.entries.tolist()


def test_the_worked_example() -> None:
    causal = torch.ones(1, 4, 4, dtype=torch.bool).tril()
    means = columns(MAP.clamp(min=1e-30).log()[None, None], torch.eye(4)[None, None], 1.0, causal, by_head=True)

    assert_close(means, MEANS[None, None])
    assert_close(summed(means, torch.ones(1, 4, dtype=torch.bool)), torch.tensor([[[2.5, 0.6, 0.6, 0.3]]]))


@pytest.mark.parametrize(("received", "expected"), [("mean", [0, 2]), ("sum", [0, 1])])
def test_two_of_four_stay(received: str, expected: list[int]) -> None:
    method = H2O(recent=0.0, received=received, steps=False)  # type: ignore[arg-type]

    assert plan(method, MEANS[None, None], layout("tttt")) == [[expected]]


@pytest.mark.parametrize(
    ("recent", "expected"), [(0.0, [0, 2, 4, 6]), (0.5, [0, 2, 6, 7]), (0.75, [0, 5, 6, 7]), (1.0, [4, 5, 6, 7])]
)
def test_the_latest_stay_beside_the_best_of_the_rest(recent: float, expected: list[int]) -> None:
    means = torch.tensor([0.9, 0.1, 0.8, 0.1, 0.7, 0.1, 0.6, 0.1])[None, None] / torch.arange(8, 0, -1)

    assert plan(H2O(keep=4, recent=recent, steps=False), means, layout("t" * 8)) == [[expected]]


def test_every_key_value_head_keeps_its_own_of_each_sample() -> None:
    means = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0)) / torch.arange(8, 0, -1)
    both = plan(H2O(keep=0.5), means, layout("tt1111tt", "..t111tt"))

    assert both is not None
    assert [len([entry for entry in head if entry >= 0]) for sample in both for head in sample] == [4] * 3 + [3] * 3
    assert all({7} <= set(head) for sample in both for head in sample)
    assert len({tuple(head) for head in both[0]}) > 1


def test_text_is_spared_where_only_pictures_may_go() -> None:
    means = torch.arange(8.0)[None, None]

    assert plan(H2O(keep=2, recent=0.5, steps=False, tokens="visual"), means, layout("tt1111tt")) == [[[0, 1, 4, 5, 6, 7]]]


@given(st.integers(2, 7), st.integers(0, 3), st.integers(1, 3), st.integers(0, 99))
def test_steps_evict_what_the_algorithm_evicts(held: int, recent: int, group: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    recent, heads = min(recent, held), 2 * group
    keys, past = torch.randn(1, 2, held, 4, generator=generator), held + 3
    tokens = torch.stack([torch.randperm(past, generator=generator)[:held].sort().values for _ in range(2)])[None]
    tokens[..., -1] = past - 1
    received = torch.rand(1, 2, held, generator=generator)
    known = [dict(zip(of.tolist(), zip(x.tolist(), k))) for of, x, k in zip(tokens[0], received[0], keys[0])]
    tally = Tally(received, torch.full((1, 1, 1), recent))
    for coming in range(past, past + 6):
        query, key = torch.randn(1, heads, 1, 4, generator=generator), torch.randn(1, 2, 1, 4, generator=generator)
        places, tally = tally.evicting(tokens, coming)
        tokens = tokens.scatter(2, places[..., None], coming)
        keys = keys.scatter(2, places[..., None, None].expand(-1, -1, 1, 4), key)
        tally = tally.seen(query, keys, None, 0.5)
        for head, entries in enumerate(known):
            del entries[min((token for token in entries if token <= coming - recent), key=lambda t: entries[t][0])]
            entries[coming] = (0.0, key[0, head, 0])
            there = torch.stack([k for _, k in entries.values()])
            gives = (query[0, head * group : (head + 1) * group, 0] @ there.T * 0.5).softmax(-1).mean(0)
            for token, more in zip(list(entries), gives.tolist()):
                entries[token] = (entries[token][0] + more, entries[token][1])
            assert set(tokens[0, head].tolist()) == set(entries)
            found = dict(zip(tokens[0, head].tolist(), tally.received[0, head].tolist()))
            assert found == pytest.approx({token: score for token, (score, _) in entries.items()}, abs=1e-5)


def test_who_sees_nothing_gives_nothing() -> None:
    tally, keys = Tally(torch.zeros(1, 1, 2), torch.zeros(1, 1, 1)), torch.randn(1, 1, 4, 3)
    allowed = torch.tensor([[False] * 4, [True, True, False, True]])[None, None]

    assert_close(tally.seen(torch.randn(1, 1, 2, 3), keys, allowed, 1.0).received.sum(), torch.tensor(1.0))


def test_a_cache_of_recent_entries_alone_is_that_of_streamingllm_without_sinks() -> None:
    body = BODIES["llava-clip"]
    model, inputs, found = body.model(), body.inputs(RAGGED), []
    for recipe in ("h2o(keep=0.4, recent=1.0)", "streamingllm(keep=0.4, sinks=0)"):
        with foveate.attach(model, recipe):
            output = generate(model, inputs, 12)
        held = [layer.ledger.tokens(3, torch.device("cpu"))[:, :1].sort().values for layer in output.past_key_values.layers]
        found.append((logits(output), held))

    assert_close(found[0][0], found[1][0], atol=1e-5, rtol=1e-5)
    assert all(map(torch.equal, found[0][1], found[1][1]))


def test_the_cache_keeps_its_size_for_512_tokens() -> None:
    model, ids = tiny.llava(grid=4), torch.tensor([[1, 20, *[tiny.IMAGE] * 16, *range(30, 40)]])
    with foveate.attach(model, "h2o(keep=0.5)"):
        output = generate(model, {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 32, 32)}, 512)

    assert {layer.keys.shape[2] for layer in output.past_key_values.layers} == {14}
    assert {layer.tally.received.shape[2] for layer in output.past_key_values.layers} == {14}


def test_it_reads_columns_by_head_in_layers_that_hold_everything() -> None:
    signals = H2O().reads(traits(sliding=(1,)))

    assert signals[:2] == (Columns(Site("decoder", 0), by_head=True), Columns(Site("decoder", 2), by_head=True))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("h2o(received='mean')", "h2o: received='mean': must be 'sum' where steps=True"),
        ("h2o(tokens='visual')", "h2o: tokens='visual': must be 'all' where steps=True"),
    ],
)
def test_what_steps_cannot_do_is_refused(recipe: str, message: str) -> None:
    with pytest.raises(FoveateError, match=message):
        foveate.Recipe.of(recipe)
