"""Factors of low rank: what is known of singular values, and attention over them as over what they stand for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.ops.lowrank import LowRank, Tiers, factorise, joint, moved, parted
from tests.ops.plain import attention


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_best_approximation_leaves_the_singular_values_that_were_dropped() -> None:
    x = torch.tensor([[[3.0, 0, 0, 0], [0, 1, 0, 0]]])
    left, right = factorise(x, 1)

    assert_close(left @ right, torch.tensor([[[3.0, 0, 0, 0], [0, 0, 0, 0]]]), atol=5e-3, rtol=0)
    assert_close((x - left @ right).norm(), torch.tensor(1.0), atol=1e-4, rtol=0)


@pytest.mark.parametrize("columns", [6, 40], ids=["exact", "randomised"])
def test_what_has_the_rank_is_rebuilt_exactly(columns: int) -> None:
    x = random(2, 30, 4) @ random(2, 4, columns, seed=1)
    left, right = factorise(x, 4)

    assert left.shape == (2, 30, 4)
    assert_close(left @ right, x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [7, 12, 50], ids=["randomised", "exact", "capped"])
def test_the_first_components_are_a_decomposition_of_their_rank(rank: int) -> None:
    sizes = torch.diag(0.5 ** torch.arange(20.0))
    x = torch.linalg.qr(random(1, 30, 20)).Q @ sizes @ torch.linalg.qr(random(1, 20, 20, seed=1)).Q.mT
    left, right = factorise(x, rank)
    direct = factorise(x, 4)

    assert left.shape[2] == min(rank, 20)
    assert_close(left[..., :4] @ right[:, :4], direct[0] @ direct[1], atol=2e-3, rtol=0)
    assert_close((x - left @ right).norm(), sizes.diagonal()[rank:].norm(), atol=2e-4, rtol=1e-2)


def test_draws_disturb_nobody_and_repeat() -> None:
    x = random(1, 30, 40)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    once, again = (factorise(x, 3)[0] for _ in range(2))

    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(once, again)


def test_heads_that_are_alike_share_a_basis() -> None:
    head = random(1, 1, 30, 3) @ random(1, 1, 3, 8, seed=1)
    x = torch.cat([head, head], dim=1)
    left, right = factorise(joint(x), 3)

    assert_close(parted(left @ right, 2), x, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rank", [2, 5], ids=["randomised", "exact"])
def test_rows_of_zeros_change_nothing(rank: int) -> None:
    x = random(1, 12, 9).double()
    alone = factorise(x, rank)
    padded = factorise(torch.nn.functional.pad(x, (0, 0, 7, 0)), rank)

    assert_close((padded[0] @ padded[1])[:, 7:], alone[0] @ alone[1])


def test_the_running_mean() -> None:
    assert_close(moved(torch.tensor([[0.2]]), torch.tensor([[[0.6]]]), 0.25), torch.tensor([[0.5]]))
    rows = torch.tensor([[[0.6], [0.2]]])
    assert_close(moved(torch.tensor([[0.2]]), rows, 0.5), torch.tensor([[0.25 * 0.2 + 0.75 * 0.4]]))


def test_shares_of_each_sample_have_its_ranks() -> None:
    importance = torch.tensor([[0.1, 0.4, 0.3, 0.2], [float("-inf"), float("-inf"), 0.2, 0.2]])
    tiers = Tiers.of((4, 2, 1), (0.25, 0.25, 0.5), [4, 2], importance, None)
    ranks = (tiers.cut(torch.ones(2, 4, 4)) != 0).sum(-1)

    assert ranks[0].tolist() == [1, 4, 2, 1]
    assert ranks[1, 2:].tolist() == [2, 1]  # round(0.5) = 0 of two entries, one above the last


def test_the_work_that_is_saved() -> None:
    ranks, shares = (64, 16), (0.1, 0.9)
    tiers = Tiers.of(ranks, shares, [1000], random(1, 1000), None)

    assert (tiers.cut(torch.ones(1, 1000, 64)) != 0).float().mean() == pytest.approx(0.325)


def test_the_published_ratio_of_storage() -> None:
    tokens, heads, width, rank = 1000, 40, 128, 64
    left, right = torch.empty(1, tokens, rank), torch.empty(1, rank, heads * width)

    assert tokens * heads * width / (left.numel() + right.numel()) == pytest.approx(13.07, abs=0.005)


@given(
    heads=st.integers(1, 3),
    group=st.integers(1, 2),
    rows=st.integers(1, 3),
    later=st.integers(0, 4),
    tiered=st.booleans(),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_is_that_over_what_is_rebuilt(
    heads: int, group: int, rows: int, later: int, tiered: bool, padded: bool, seed: int
) -> None:
    store = lowrank(heads, tiered, padded, seed)
    keys, values = (random(2, heads, later, 8, seed=seed + n) for n in (1, 2))
    query, allowed = random(2, heads * group, rows, 8, seed=seed + 3), random(2, 1, rows, later, seed=seed + 4) > 0
    mine = store.rebuilt(turned)
    there = torch.ones(2, 10, dtype=torch.bool) if store.there is None else store.there
    visible = torch.cat([there[:, None, None].expand(-1, 1, rows, -1), allowed], dim=-1)
    expected, probabilities, mass = attention(query, mine, (keys, values), visible, 0.3)

    assert_close(store.log_mass(query, 0.3, turned), mass, atol=1e-5, rtol=1e-5)
    before = store.tiers.importance if store.tiers else None
    assert_close(store.attend(query, keys, values, allowed, 0.3, turned), expected, atol=1e-5, rtol=1e-5)
    if store.tiers is not None and before is not None:
        shown = probabilities[:, :, :, :10].mean(1)
        now = moved(before, shown, 0.25) if rows == 1 else before
        assert_close(store.tiers.importance, now, atol=1e-6, rtol=1e-5)


def test_beams_take_their_factors_along() -> None:
    store, order = lowrank(2, True, True, 0), torch.tensor([1, 1, 0])
    query, nothing = random(2, 2, 1, 8), torch.zeros(2, 2, 0, 8)
    moved_on = store.batched(order)

    out = moved_on.attend(query[order], nothing[order], nothing[order], None, 1.0, turned)
    assert_close(out, store.attend(query, nothing, nothing, None, 1.0, turned)[order])
    assert store.tiers is not None
    assert moved_on.tiers is not None
    assert_close(moved_on.tiers.importance, store.tiers.importance[order])


def turned(x: Tensor, positions: Tensor) -> Tensor:
    """A rotation for the purpose."""
    angle = positions[0, :, None, :, None] * torch.tensor([1.0, 0.3, 0.1, 0.05])
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()], dim=-1)


def lowrank(heads: int, tiered: bool, padded: bool, seed: int) -> LowRank:
    """Ten entries of the first sample, eight of the second if it is padded."""
    key, value = (factorise(joint(random(2, heads, 10, 8, seed=seed + n)), 5) for n in (5, 6))
    there = torch.arange(10) >= torch.tensor([[0], [2]]) if padded else None
    importance = random(2, 10, seed=seed + 7).exp()
    importance = importance if there is None else importance.masked_fill(~there, float("-inf"))
    tiers = Tiers.of((5, 3, 1), (0.2, 0.3, 0.5), [10, 8 if padded else 10], importance, 0.25) if tiered else None
    positions = torch.arange(10, dtype=torch.int32).expand(1, 2, -1)
    return LowRank(key, value, heads, positions, there, tiers)
