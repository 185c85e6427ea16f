"""The best entries win, and among equals the first."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

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
