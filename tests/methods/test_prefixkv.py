"""PrefixKV: the card's priorities, the two searches, the cut, and what decoding evicts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.artifact import Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.signal import Columns, Numbers, Seen, Signal, Site
from foveate.methods import PrefixKV
from foveate.methods.kv_cache.prefixkv import (
    SHARES,
    bisected_drops,
    dropped_at,
    evicted,
    exact_counts,
    importance,
    priority,
    slot,
)
from tests.methods.bodiless import layout, traits

A, B = [0.5, 0.25, 0.125, 0.125], [0.25, 0.25, 0.25, 0.25]
HAND = torch.tensor([[A], [B]])
"""``[L, B, n]`` importance of the card's two layers."""
SMALL = Fingerprint("llava", 3, 8, 64)


def drawn(layers: int, *prompts: str, seed: int = 0) -> tuple[Tensor, Layout]:
    """Column means of each layer, spread differently, and the prompts; the same from the end, whatever the padding."""
    made = layout(*prompts)
    rows = torch.rand(layers, made.shape[0], 64, generator=torch.Generator().manual_seed(seed))
    exponent = torch.arange(1, layers + 1)[:, None, None] * 2
    return (rows**exponent)[..., -made.shape[1] :] * made.valid, made


@pytest.mark.parametrize(
    ("threshold", "counts"), [(0.5, [1, 2]), (0.6, [2, 3]), (0.75, [2, 3]), (0.76, [3, 4]), (0.9, [4, 4])]
)
def test_entries_at_a_threshold(threshold: float, counts: list[int]) -> None:
    kept = (priority(HAND[:, 0]) < threshold).sum(-1) + 1

    assert kept.tolist() == counts


def test_the_budget_of_the_hand_example_is_met_exactly() -> None:
    live = torch.full((2, 1), 4)

    assert exact_counts(HAND, live, torch.tensor([5]), protect=0).tolist() == [[2], [3]]


def test_the_released_search_on_the_hand_example_in_a_hundred_parts() -> None:
    parts = HAND.repeat_interleave(25, dim=-1)
    drops = bisected_drops(parts, torch.full((2, 1), 100), torch.tensor([75.0]), protect=0)

    assert drops.tolist() == [[50], [25]]


@given(st.integers(1, 4), st.integers(4, 12), st.integers(0, 3), st.integers(0, 99), st.data())
def test_the_exact_search_meets_every_budget(
    layers: int, entries: int, protect: int, seed: int, data: st.DataObject
) -> None:
    scores, _ = drawn(layers, "t" * entries, seed=seed)
    live = torch.full((layers, 1), entries)
    budget = data.draw(st.integers(layers * protect, layers * entries))
    counts = exact_counts(scores, live, torch.tensor([budget]), protect)[:, 0]

    assert counts.sum() == budget
    assert counts.min() >= protect
    more = exact_counts(scores, live, torch.tensor([min(budget + 1, layers * entries)]), protect)[:, 0]
    assert (more >= counts).all()


def test_equal_layers_get_equal_budgets() -> None:
    scores = torch.rand(1, 1, 10).expand(4, -1, -1)

    assert exact_counts(scores, torch.full((4, 1), 10), torch.tensor([24]), 2)[:, 0].tolist() == [6] * 4


def test_a_layer_that_looks_at_one_entry_keeps_the_least() -> None:
    scores = torch.full((3, 1, 10), 0.1)
    scores[1, 0] = torch.eye(10)[3]

    counts = exact_counts(scores, torch.full((3, 1), 10), torch.tensor([15]), 0)[:, 0].tolist()
    assert counts == [7, 1, 7]


def test_importance_is_the_sum_over_the_queries_that_see_an_entry() -> None:
    attention = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.4, 0.0], [0.5, 0.1, 0.4]])
    means = attention.sum(0) / torch.tensor([3, 2, 1])
    padded = torch.cat([torch.zeros(2), means])[None]

    assert_close(importance(means[None], layout("ttt").valid), attention.sum(0)[None])
    assert_close(importance(padded, layout("..ttt").valid)[:, 2:], attention.sum(0)[None])


def plan(method: PrefixKV, means: Tensor, prompts: Layout, numbers: Any = None) -> list[Kept | None]:
    seen = {Columns(Site("decoder", layer)): of_layer for layer, of_layer in enumerate(means)}
    seen[Numbers("prefixkv")] = numbers  # type: ignore[index]
    empty = torch.zeros(prompts.shape[0], 1, prompts.shape[1], 1)
    scores = [method.score(layer, empty, empty, seen, prompts) for layer in range(len(means))]
    return method.plan(scores, [prompts] * len(means))


def entries(kept: Kept | None, sample: int, prompts: Layout) -> list[int]:
    if kept is None:
        return list(range(prompts.shape[1] - prompts.live[sample], prompts.shape[1]))
    return [entry for entry in kept.entries[sample, 0].tolist() if entry >= 0]


@given(st.floats(0.3, 0.95), st.integers(0, 3), st.sampled_from(["exact", "bisect"]), st.integers(0, 99))
def test_first_and_last_tokens_and_the_best_stay_in_order(keep: float, start: int, search: Any, seed: int) -> None:
    means, prompt = drawn(3, "t" * 30, seed=seed)
    scores = importance(means.flatten(0, 1), prompt.valid.expand(3, -1))
    plans = plan(PrefixKV(keep=keep, search=search, start_size=start), means, prompt)

    total = 0
    for kept, score in zip(plans, scores):
        found = entries(kept, 0, prompt)
        total += len(found)
        assert found == sorted(set(found))
        assert {*range(start), 29} <= set(found)
        free = [entry for entry in range(start, 29)]
        dropped = [entry for entry in free if entry not in found]
        stayed = [entry for entry in free if entry in found]
        assert not dropped or not stayed or score[dropped].max() <= score[stayed].min()
    if search == "exact":
        assert total == int(keep * 90)
    else:
        assert abs(total - keep * 90) <= 5 + 3


@given(st.integers(0, 12), st.sampled_from(["exact", "bisect"]), st.integers(0, 9))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(padding: int, search: Any, seed: int) -> None:
    length = 30 - padding
    means, prompts = drawn(3, "." * padding + "t" * length, "t" * 30, seed=seed)
    method = PrefixKV(keep=0.6, search=search)
    together = plan(method, means, prompts)
    alone = plan(method, means[:, :1, padding:], layout("t" * length))

    for padded, plain in zip(together, alone):
        assert entries(padded, 0, prompts) == [entry + padding for entry in entries(plain, 0, layout("t" * length))]


def test_a_count_is_the_mean_of_the_layers() -> None:
    means, prompt = drawn(3, "t" * 30)

    assert sum(len(entries(kept, 0, prompt)) for kept in plan(PrefixKV(keep=10), means, prompt)) == 30


def test_layers_left_alone_do_not_count() -> None:
    means, prompt = drawn(3, "t" * 30)
    method = PrefixKV(keep=10)
    scores = [importance(means[0], prompt.valid), None, importance(means[2], prompt.valid)]
    plans = method.plan(scores, [prompt] * 3)

    assert plans[1] is None
    assert sum(len(entries(plans[layer], 0, prompt)) for layer in (0, 2)) == 20


def test_layers_may_hold_different_numbers_of_entries() -> None:
    long, short = drawn(1, "t" * 30), drawn(1, "t" * 20, seed=1)
    scores = [importance(means[0], prompt.valid) for means, prompt in (long, short)]
    plans = PrefixKV(keep=0.5).plan(scores, [long[1], short[1]])

    assert sum(len(entries(kept, 0, prompt)) for kept, prompt in zip(plans, (long[1], short[1]))) == 25


def test_the_whole_budget_leaves_the_cache_alone() -> None:
    means, prompt = drawn(3, "t" * 30)

    assert plan(PrefixKV(keep=1.0), means, prompt) == [None] * 3
    assert plan(PrefixKV(keep=99), means, prompt) == [None] * 3


def test_a_prompt_of_protected_tokens_is_left_alone() -> None:
    means, prompt = drawn(3, "tt")

    assert plan(PrefixKV(keep=0.2), means, prompt) == [None] * 3


@pytest.mark.parametrize(
    ("prompt", "distance", "where"), [(40, -25, 15), (10, -25, 5), (26, -25, 1), (40, 7, 7), (40, 0, 40)]
)
def test_the_slot(prompt: int, distance: int, where: int) -> None:
    assert slot(prompt, distance) == where


def test_decoding_holds_the_share_and_keeps_the_newest() -> None:
    method, cache, length = PrefixKV(), [*range(60, 100)], 100
    for step in range(100):
        gone = method.step(0, 40, len(cache), length + step + 1, length)
        if gone is not None:
            assert gone == 15
            del cache[gone]
        cache.append(length + step)
        assert abs(len(cache) - 0.4 * (length + step + 1)) <= 2

    assert cache[:15] == list(range(60, 75))
    assert cache[15:] == list(range(200 - len(cache) + 15, 200))


def test_decoding_evicts_nothing_where_nothing_was_cut() -> None:
    assert all(PrefixKV().step(0, 50, 50 + step, 51 + step, 50) is None for step in range(20))


def test_at_most_one_entry_goes_in_a_step() -> None:
    assert evicted(held=90, seen=100, share=0.2, prompt=40, distance=-25) == 15
    assert evicted(held=20, seen=100, share=0.2, prompt=40, distance=-25) is None


class Call:
    """Attention received in two batches of calibration prompts, a `ModelCall`."""

    traits = traits(SMALL, sliding=(1,))

    def __init__(self) -> None:
        self.batches = [drawn(3, "t" * 30, "....." + "t" * 25, seed=seed) for seed in range(2)]

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        for means, prompts in self.batches:
            known = {Columns(Site("decoder", layer)): of_layer for layer, of_layer in enumerate(means)}
            yield prompts, {signal: known[signal] for signal in signals}


def test_the_profile_drops_on_average_what_was_asked() -> None:
    profile = PrefixKV().calibrate(Call())  # type: ignore[arg-type]

    assert profile["keep"] == list(SHARES)
    for share, dropped in zip(profile["keep"], profile["dropped"]):
        assert dropped[1] == 0
        assert (dropped[0] + dropped[2]) / 2 == pytest.approx(1 - share, abs=0.04)
        assert dropped[2] >= dropped[0]


def test_the_profile_is_linear_between_its_budgets() -> None:
    profile = {"keep": [0.2, 0.6], "dropped": [[0.9, 0.7], [0.5, 0.3]]}

    assert dropped_at(0.2, profile) == pytest.approx([0.9, 0.7])
    assert dropped_at(0.4, profile) == pytest.approx([0.7, 0.5])
    assert dropped_at(0.8, profile) == pytest.approx([0.25, 0.15])
    assert dropped_at(1.0, profile) == pytest.approx([0.0, 0.0])
    assert dropped_at(0.1, profile) == pytest.approx([0.95, 0.85])


def test_a_profile_cuts_each_layer_by_its_share() -> None:
    means, prompts = drawn(3, "t" * 30, "." * 10 + "t" * 20)
    profile = {"keep": [0.5], "dropped": [[0.2, 0.5, 0.8]]}
    plans = plan(PrefixKV(keep=0.5, search="offline"), means, prompts, profile)

    assert [[len(entries(kept, sample, prompts)) for kept in plans] for sample in range(2)] == [[24, 15, 6], [16, 10, 4]]
    assert plan(PrefixKV(keep=1.0, search="offline"), means, prompts, profile) == [None] * 3


def test_a_profile_that_is_not_there_is_refused() -> None:
    there = {"prefixkv": PrefixKV().artifact(SMALL, {})}

    assert "foveate calibrate prefixkv" in str(PrefixKV(search="offline").check(traits()))
    assert PrefixKV(search="offline").check(traits(SMALL, artifacts=there)) is None
    assert PrefixKV().check(traits()) is None


def test_a_profile_of_other_protected_entries_is_refused() -> None:
    there = {"prefixkv": PrefixKV(start_size=4).artifact(SMALL, {})}

    with pytest.raises(FoveateError, match="made with start_size=4; use that, or calibrate it again with start_size=1"):
        PrefixKV(search="offline").check(traits(SMALL, artifacts=there))
    assert PrefixKV(search="offline", start_size=4).check(traits(SMALL, artifacts=there)) is None
    assert PrefixKV(start_size=2).check(traits(SMALL, artifacts=there)) is None


def test_it_reads_columns_where_caches_may_shrink() -> None:
    model = traits(SMALL, sliding=(1,))

    assert PrefixKV().reads(model) == (Columns(Site("decoder", 0)), Columns(Site("decoder", 2)))
    assert PrefixKV(search="offline").reads(model)[-1] == Numbers("prefixkv")


@pytest.mark.parametrize(
    ("parameter", "value"), [("keep", 0.0), ("keep", 1.2), ("search", "fast"), ("start_size", -1), ("distance", 0.5)]
)
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"prefixkv: {parameter}="):
        PrefixKV(**{parameter: value})
