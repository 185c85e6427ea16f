"""The best entries win, and among equals the first."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import select
from foveate.ops.select import top_k, top_of_groups, top_rows

# Few distinct scores make many ties.
scores = st.lists(st.integers(-2, 2), min_size=1, max_size=12)


@given(scores, st.integers(0, 12))
def test_the_best_come_first_and_of_equals_the_lowest_index(drawn: list[int], k: int) -> None:
    best = sorted(range(len(drawn)), key=lambda index: (-drawn[index], index))[:k]

    assert top_k(torch.tensor(drawn, dtype=torch.float32), k).tolist() == best


@given(st.lists(scores.filter(lambda drawn: len(drawn) >= 3).map(lambda drawn: drawn[:3]), min_size=1, max_size=4))
def test_every_row_is_ranked_by_itself(drawn: list[list[int]]) -> None:
    table = torch.tensor(drawn, dtype=torch.float32)

    assert torch.equal(top_k(table, 2), torch.stack([top_k(row, 2) for row in table]))


TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8, torch.int16, torch.int32, torch.int64)
SPECIAL = (float("nan"), float("inf"), float("-inf"), 0.0, -0.0, 1.0, -1.0, 1e-45, -1e-45, 3.4e38, -3.4e38)


@st.composite
def tables(draw: st.DrawFn) -> Tensor:
    """``[2, 3, n]`` scores of any type, with ties, infinities, nans of any bits, and zeros of either sign."""
    kind = draw(st.sampled_from(TYPES))
    count = draw(st.integers(1, 12))
    if not kind.is_floating_point:
        bounds = torch.iinfo(kind)
        number = st.one_of(st.sampled_from((bounds.min, bounds.max)), st.integers(0, 3))
    else:
        number = st.one_of(st.sampled_from(SPECIAL), st.integers(-3, 3).map(float))
    table = torch.tensor(draw(st.lists(number, min_size=6 * count, max_size=6 * count)), dtype=kind).reshape(2, 3, count)
    return -table if kind.is_floating_point and draw(st.booleans()) else table


@given(tables(), st.integers(0, 13))
def test_a_partial_sort_chooses_as_a_stable_one_of_all_does(table: Tensor, k: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(select, "SHORT", 0)
        best = top_k(table, k)

    assert torch.equal(best, table.sort(dim=-1, descending=True, stable=True).indices[..., :k])


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("share", [0.05, 0.6, 1.0])
def test_long_rows_are_ranked_as_short_ones_are(kind: torch.dtype, share: float) -> None:
    table = (torch.randn(4, 5000, generator=torch.Generator().manual_seed(0)) * 20).to(kind)
    k = int(share * 5000)

    assert torch.equal(top_k(table, k), table.sort(dim=-1, descending=True, stable=True).indices[..., :k])


def test_scores_may_be_part_of_a_graph() -> None:
    table = torch.randn(2, 5000, requires_grad=True)

    assert torch.equal(top_k(table, 9), top_k(table.detach(), 9))


@given(st.lists(st.lists(st.tuples(st.integers(-2, 2), st.booleans()), min_size=6, max_size=6), min_size=1), st.data())
def test_each_sample_keeps_its_own_count_of_candidates(drawn: list[list[tuple[int, bool]]], data: st.DataObject) -> None:
    table = torch.tensor([[score for score, _ in row] for row in drawn], dtype=torch.float32)
    candidates = torch.tensor([[candidate for _, candidate in row] for row in drawn])
    counts = [data.draw(st.integers(0, 7)) for _ in drawn]

    expected = []
    for row, count in zip(drawn, counts):
        eligible = [index for index, (_, candidate) in enumerate(row) if candidate]
        expected.append(sorted(sorted(eligible, key=lambda index: (-row[index][0], index))[:count]))
    assert [row.nonzero().flatten().tolist() for row in top_rows(table, candidates, counts)] == expected


def test_the_worst_candidate_is_better_than_none() -> None:
    worst = torch.tensor([[1.0, float("-inf")]])

    assert top_rows(worst, torch.tensor([[False, True]]), [1]).tolist() == [[False, True]]


rows = st.lists(st.tuples(st.integers(-2, 2), st.integers(-1, 2)), min_size=6, max_size=6)


@given(st.lists(rows, min_size=1, max_size=3), st.data())
def test_every_group_keeps_its_own_count(drawn: list[list[tuple[int, int]]], data: st.DataObject) -> None:
    table = torch.tensor([[score for score, _ in row] for row in drawn], dtype=torch.float32)
    group = torch.tensor([[number for _, number in row] for row in drawn])
    counts = [[data.draw(st.integers(0, 4)) for _ in range(3)] for _ in drawn]

    expected = []
    for row, of in zip(drawn, counts):
        best = sorted(range(len(row)), key=lambda index: (-row[index][0], index))
        expected.append(sorted(i for g, count in enumerate(of) for i in [i for i in best if row[i][1] == g][:count]))
    assert [row.nonzero().flatten().tolist() for row in top_of_groups(table, group, counts)] == expected


def test_samples_may_have_different_numbers_of_groups() -> None:
    group = torch.tensor([[0, 0, 1], [-1, -1, -1]])

    assert top_of_groups(torch.zeros(2, 3), group, [[1, 1], []]).tolist() == [[True, False, True], [False] * 3]
