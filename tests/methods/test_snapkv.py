"""SnapKV: the card's pooling example and invariants."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.signal import Attention, Rows, Site
from foveate.methods import SnapKV
from foveate.methods.kv_cache.entries import best_entries
from foveate.methods.kv_cache.snapkv import window_scores
from tests.methods.bodiless import layout, traits

MEANS = [0.1, 0.4, 0.0, 0.0, 0.3, 0.0]


def example() -> Tensor:
    """``[1, 1, 2, 8]`` attention of two window queries whose mean over the six rows before them is `MEANS`."""
    spread = torch.tensor(MEANS) * 0.5
    rows = torch.stack([torch.tensor(MEANS) - spread, torch.tensor(MEANS) + spread])
    return torch.cat([rows, torch.full((2, 2), 0.1)], dim=1)[None, None]


def last(rows: int, width: int) -> Tensor:
    return (torch.arange(rows) >= rows - width)[None]


def attention(*, heads: int, queries: int, keys: int, seed: int) -> Tensor:
    return torch.rand(1, heads, queries, keys, generator=torch.Generator().manual_seed(seed)).softmax(-1)


def score(method: SnapKV, probabilities: Tensor, prompts: Layout, kv_heads: int) -> Tensor | None:
    observed = Attention(probabilities.log(), torch.zeros(probabilities.shape[:-1]))
    stored = torch.zeros(len(probabilities), kv_heads, prompts.shape[1], 4)
    return method.score(0, stored, stored, {Rows(Site("decoder"), method.window, keys="cache"): observed}, prompts)


def test_the_pooling_example() -> None:
    scores = window_scores(example(), last(8, 2), kv_heads=1, kernel=3)

    assert_close(scores[0, 0, :6], torch.tensor([0.5, 0.5, 0.4, 0.3, 0.3, 0.3]) / 3)


def test_four_of_eight_are_the_best_two_and_the_window() -> None:
    method, prompt = SnapKV(keep=0.5, window=2, kernel=3), layout("tttttttt")
    (kept,) = method.plan([score(method, example(), prompt, kv_heads=1)], [prompt])

    assert kept is not None
    assert kept.entries.tolist() == [[[0, 1, 6, 7]]]


def test_window_rows_score_one_above_the_largest() -> None:
    scores = window_scores(example(), last(8, 2), kv_heads=1, kernel=3)[0, 0]

    assert_close(scores[6:], (scores[:6].max() + 1).expand(2))


def test_query_heads_are_averaged_by_the_key_value_head_that_they_share() -> None:
    probabilities = attention(heads=4, queries=3, keys=9, seed=0)
    both = window_scores(probabilities, last(9, 3), kv_heads=2, kernel=3)
    each = window_scores(probabilities, last(9, 3), kv_heads=4, kernel=3)

    assert_close(both[..., :6], each.reshape(1, 2, 2, 9).mean(2)[..., :6])


@given(st.integers(1, 4), st.integers(1, 9), st.sampled_from([1, 3, 5]), st.integers(0, 99), st.data())
def test_the_window_always_survives(width: int, more: int, kernel: int, seed: int, data: st.DataObject) -> None:
    rows = width + more
    count = data.draw(st.integers(width, rows))
    probabilities = attention(heads=4, queries=width, keys=rows, seed=seed)
    scores = window_scores(probabilities, last(rows, width), kv_heads=2, kernel=kernel)
    kept = best_entries(scores, torch.ones(1, rows, dtype=torch.bool), [count])

    assert kept.shape == (1, 2, count)
    assert kept.diff().gt(0).all()
    assert torch.equal(kept[..., -width:], torch.arange(more, rows).expand(1, 2, -1))


def test_every_key_value_head_keeps_its_own_entries() -> None:
    scores = torch.tensor([[[4.0, 1.0, 3.0, 2.0], [1.0, 4.0, 2.0, 3.0]]])

    assert best_entries(scores, torch.ones(1, 4, dtype=torch.bool), [2]).tolist() == [[[0, 2], [1, 3]]]


def test_samples_of_different_length_are_padded_on_the_left() -> None:
    valid = torch.tensor([[True] * 4, [False, False, True, True]])
    kept = best_entries(torch.arange(4.0).expand(2, 1, 4), valid, [3, 1])

    assert kept.tolist() == [[[1, 2, 3]], [[-1, -1, 3]]]


def test_of_equal_entries_the_first_stay() -> None:
    assert best_entries(torch.zeros(1, 1, 5), torch.ones(1, 5, dtype=torch.bool), [2]).tolist() == [[[0, 1]]]


@given(st.integers(0, 4), st.booleans(), st.sampled_from([1, 3, 5]), st.integers(0, 99))
def test_a_padded_prompt_keeps_what_it_keeps_alone(padding: int, left: bool, kernel: int, seed: int) -> None:
    method = SnapKV(keep=0.5, window=3, kernel=kernel)
    before, after = (padding, 0) if left else (0, padding)
    alone = attention(heads=2, queries=3, keys=10, seed=seed)
    padded = torch.nn.functional.pad(alone, (before, after))
    plain, prompt = layout("t" * 10), layout("." * before + "t" * 10 + "." * after)

    (expected,) = method.plan([score(method, alone, plain, kv_heads=2)], [plain])
    (kept,) = method.plan([score(method, padded, prompt, kv_heads=2)], [prompt])
    assert expected is not None
    assert kept is not None
    assert torch.equal(kept.entries, expected.entries + before)


def test_the_budget_is_floored_as_in_kvpress() -> None:
    method, prompt = SnapKV(keep=0.5, window=2, kernel=3), layout("ttttttttt")
    (kept,) = method.plan([torch.rand(1, 2, 9)], [prompt])

    assert kept is not None
    assert kept.entries.shape == (1, 2, 4)


def test_the_whole_budget_leaves_the_cache_alone() -> None:
    prompt = layout("tttttttt")

    assert SnapKV(keep=1.0).plan([torch.rand(1, 2, 8)], [prompt]) == [None]


def test_a_prompt_that_fits_into_the_window_is_left_alone() -> None:
    method, prompt = SnapKV(window=8), layout("tttttttt")
    scores = score(method, attention(heads=2, queries=8, keys=8, seed=0), prompt, kv_heads=2)

    assert scores is None
    assert method.plan([scores], [prompt]) == [None]


def test_it_reads_the_window_in_every_layer() -> None:
    signals = SnapKV(window=16).reads(traits())

    assert signals == tuple(Rows(Site("decoder", layer), 16, keys="cache") for layer in range(32))


def test_a_window_larger_than_the_budget_keeps_its_last_rows() -> None:
    prompt = Layout.build(
        visual=torch.zeros(1, 12, dtype=torch.bool),
        valid=torch.ones(1, 12, dtype=torch.bool),
        positions=torch.arange(12)[None, None],
        items=[()],
    )
    method = SnapKV(keep=0.25, window=8)
    logits = torch.rand(1, 2, 8, 12, generator=torch.Generator().manual_seed(0))
    seen = {Rows(Site("decoder", 0), 8, keys="cache"): Attention(logits, logits.logsumexp(-1))}
    score = method.score(0, torch.zeros(1, 2, 12, 4), torch.zeros(1, 2, 12, 4), seen, prompt)
    (kept,) = method.plan([score], [prompt])
    assert kept is not None
    assert kept.entries.tolist() == [[[9, 10, 11]] * 2]


def test_text_is_spared_where_only_pictures_may_go() -> None:
    method, prompts = SnapKV(keep=0.5, window=2, kernel=1, tokens="visual"), layout("tt1111tt", "..t111tt")
    probabilities = attention(heads=2, queries=2, keys=8, seed=0).expand(2, -1, -1, -1)
    (kept,) = method.plan([score(method, probabilities, prompts, kv_heads=2)], [prompts])

    assert kept is not None
    assert kept.counts == (4 + 2, 3 + 1)
    heads = [[[entry for entry in head if entry >= 0] for head in sample] for sample in kept.entries.tolist()]
    assert all({0, 1, 6, 7} <= set(head) and len(head) == 6 for head in heads[0])
    assert all({2, 6, 7} <= set(head) and len(head) == 4 for head in heads[1])
    best = (
        window_scores(probabilities, prompts.valid & (torch.arange(8) >= 6), kv_heads=2, kernel=1)[0, :, 2:6].topk(2).indices
    )
    assert [sorted(entry - 2 for entry in head if 2 <= entry < 6) for head in heads[0]] == best.sort().values.tolist()


def test_of_a_window_that_reaches_into_the_picture_the_last_entries_stay_as_far_as_the_budget_goes() -> None:
    method, prompt = SnapKV(keep=2, window=5, tokens="visual"), layout("t111111tt")
    (kept,) = method.plan([score(method, attention(heads=2, queries=5, keys=9, seed=0), prompt, kv_heads=2)], [prompt])

    assert kept is not None
    assert kept.entries.tolist() == [[[0, 5, 6, 7, 8]] * 2]


def test_a_prompt_that_ends_in_its_picture_keeps_its_last_entry() -> None:
    method, prompt = SnapKV(keep=1, window=3, tokens="visual"), layout("tt111111")
    (kept,) = method.plan([score(method, attention(heads=2, queries=3, keys=8, seed=0), prompt, kv_heads=2)], [prompt])

    assert kept is not None
    assert kept.entries.tolist() == [[[0, 1, 7]] * 2]


def test_a_prompt_without_pictures_is_left_alone_where_only_they_may_go() -> None:
    prompt = layout("tttttttt")

    assert SnapKV(keep=0.5, window=2, tokens="visual").plan([torch.rand(1, 2, 8)], [prompt]) == [None]
