"""Parts of an attention map equal the same parts of the whole map."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.ops.attention import causal, columns, from_rows, received, row_logits

sizes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "kv_heads": st.integers(1, 2),
        "groups": st.integers(1, 3),
        "queries": st.integers(1, 7),
        "keys": st.integers(1, 7),
        "seed": st.integers(0, 99),
    }
)
chunks = st.integers(1, 8)
SCALE = 0.5


def drawn(batch: int, kv_heads: int, groups: int, queries: int, keys: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, kv_heads * groups, queries, 4, generator=generator)
    return query, torch.randn(batch, kv_heads, keys, 4, generator=generator)


def whole_logits(query: Tensor, key: Tensor) -> Tensor:
    """``[B, H, Q, K]`` with the keys repeated for every query head."""
    repeated = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    return torch.einsum("bhqd,bhkd->bhqk", query, repeated) * SCALE


@given(sizes)
def test_rows_of_logits_are_those_of_the_whole_map(size: dict[str, int]) -> None:
    query, key = drawn(**size)

    assert_close(row_logits(query[:, :, -1:], key, SCALE), whole_logits(query, key)[:, :, -1:])


@given(sizes, chunks)
def test_columns_are_means_of_the_whole_map(size: dict[str, int], chunk: int) -> None:
    query, key = drawn(**size)

    assert_close(columns(query, key, SCALE, chunk=chunk), whole_logits(query, key).softmax(-1).mean((1, 2)))


@given(sizes, chunks)
def test_keys_elsewhere_take_their_share(size: dict[str, int], chunk: int) -> None:
    query, key = drawn(**size)
    here = key.shape[2] // 2 + 1
    elsewhere = whole_logits(query, key[:, :, here:]).logsumexp(-1)

    shown = columns(query, key[:, :, :here], SCALE, chunk=chunk, elsewhere=elsewhere)
    assert_close(shown, columns(query, key, SCALE, chunk=chunk)[:, :here])


@given(sizes, chunks, st.data())
def test_columns_under_a_mask_are_means_over_the_queries_that_see_them(
    size: dict[str, int], chunk: int, data: st.DataObject
) -> None:
    query, key = drawn(**size)
    batch = data.draw(st.sampled_from([1, size["batch"]]))
    count = batch * size["queries"] * size["keys"]
    flags = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    allowed = torch.tensor(flags).reshape(batch, size["queries"], size["keys"])

    probabilities = whole_logits(query, key).masked_fill(~allowed[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
    seen_by = allowed.sum(1).clamp(min=1)
    expected = probabilities.mean(1).sum(1) / seen_by
    assert_close(columns(query, key, SCALE, allowed, chunk), expected)


@given(sizes, chunks, st.integers(0, 3), st.integers(0, 99))
def test_received_attention_is_a_weighted_sum_over_the_rows_of_the_whole_map(
    size: dict[str, int], chunk: int, padding: int, seed: int
) -> None:
    query, _ = drawn(**size)
    batch, _, rows, _ = query.shape
    key = query[:, :: size["groups"]]
    weight = torch.rand(batch, 2, rows, generator=torch.Generator().manual_seed(seed))
    valid = (torch.arange(rows) >= min(padding, rows - 1)).expand(batch, -1)
    visible = torch.ones(rows, rows, dtype=torch.bool).tril() & valid[:, None]

    logits = whole_logits(query, key).masked_fill(~visible[:, None], float("-inf"))
    expected = weight @ logits.softmax(-1).nan_to_num(0.0).mean(1)
    assert_close(received(query, key, weight, SCALE, causal(valid), chunk), expected)
    assert_close(received(query, key, weight, SCALE, None, chunk), weight @ whole_logits(query, key).softmax(-1).mean(1))


def test_received_attention_has_gradients_beside_padding() -> None:
    query, key = drawn(batch=1, kv_heads=1, groups=1, queries=4, keys=4, seed=0)
    query.requires_grad_()
    valid = torch.tensor([[False, True, True, True]])
    received(query, key, valid[:, None], SCALE, causal(valid)).square().sum().backward()

    assert query.grad is not None
    assert query.grad.isfinite().all()
    assert query.grad[:, :, 0].abs().sum() == 0


def test_a_causal_mask_divides_by_the_queries_that_come_after() -> None:
    # The rows of the card's worked example: [1], [.6, .4], [.5, .1, .4], [.4, .1, .2, .3].
    attention = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.6, 0.4, 0.0, 0.0], [0.5, 0.1, 0.4, 0.0], [0.4, 0.1, 0.2, 0.3]])
    query = attention.clamp(min=1e-30).log()[None, None]
    allowed = torch.ones(1, 4, 4, dtype=torch.bool).tril()

    assert_close(columns(query, torch.eye(4)[None, None], 1.0, allowed), torch.tensor([[0.625, 0.2, 0.3, 0.3]]))


def test_half_precision_is_computed_in_single() -> None:
    query, key = drawn(batch=1, kv_heads=2, groups=2, queries=5, keys=5, seed=0)
    query, key = query.bfloat16(), key.bfloat16()

    assert columns(query, key, SCALE).dtype == torch.float32
    assert torch.equal(row_logits(query, key, SCALE), row_logits(query.float(), key.float(), SCALE))


def test_what_reaches_every_key_adds_up_to_one() -> None:
    query, key = drawn(batch=2, kv_heads=2, groups=1, queries=9, keys=11, seed=1)

    assert_close(columns(query, key, SCALE, chunk=4).sum(1), torch.ones(2))


@given(sizes, chunks, st.data())
def test_attention_from_some_rows_is_their_mean(size: dict[str, int], chunk: int, data: st.DataObject) -> None:
    query, key = drawn(**size)
    batch, queries = size["batch"], size["queries"]
    rows = torch.tensor([[data.draw(st.integers(-1, queries - 1)) for _ in range(3)] for _ in range(batch)])
    allowed = torch.rand(batch, 1, size["keys"], generator=torch.Generator().manual_seed(size["seed"])) < 0.7
    received = from_rows(query, key, rows, allowed, chunk)

    logits = whole_logits(query, key).masked_fill(~allowed[:, None], float("-inf"))  # 4 wide: the scale is 0.5
    map_ = logits.softmax(-1).nan_to_num(0.0).mean(1)
    for b in range(batch):
        chosen = [row for row in rows[b].tolist() if row >= 0]
        assert_close(received[b], map_[b, chosen].mean(0) if chosen else torch.zeros(size["keys"]))
