"""Bipartite matching: ToMe's worked example, and what holds for any tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.ops.matching import Order, averaging, bipartite

ORDERS: tuple[Order, ...] = ("grouped", "similarity", "raster")
HAND = torch.tensor([[[1, 0], [0, 1], [1, 0.05], [1, 0.1], [0, 1], [0.7, 0.7]]])


Problem = tuple[Tensor, tuple[int, ...], tuple[int, ...], Tensor, int, Order]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Tokens, rows to remove and rows alive of each sample, which these are, protected rows, order."""
    protected = draw(st.integers(0, 2))
    live = tuple(draw(st.lists(st.integers(protected + 1, 12), min_size=1, max_size=3)))
    width = max(*live, 2) + draw(st.integers(0, 2))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    valid = torch.zeros(len(live), width, dtype=torch.bool)
    for sample, count in enumerate(live):
        valid[sample, torch.randperm(width, generator=generator)[:count]] = True
    r = tuple(draw(st.integers(0, (count - protected) // 2)) for count in live)
    metric = torch.randn(len(live), width, 4, generator=generator)
    return metric, r, live, valid, protected, draw(st.sampled_from(ORDERS))


def test_the_worked_example() -> None:
    values = torch.arange(6.0)[None, :, None]
    first = averaging(*bipartite(HAND, (2,), (6,), order="similarity"), torch.ones(1, 6))
    size = first.mass(torch.ones(1, 6))

    assert first.apply(values).flatten().tolist() == [0, 2.5, 2.5, 5]
    assert size.tolist() == [[1, 2, 2, 1]]

    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    second = averaging(*bipartite(metric, (1,), (4,), order="similarity"), size)

    assert_close(second.apply(first.apply(values)).flatten(), torch.tensor([2.5, 5 / 3, 5]))
    assert second.mass(size).tolist() == [[2, 3, 1]]


def test_ties_go_to_the_lowest_places() -> None:
    assignment, anchor = bipartite(torch.ones(1, 6, 2), (2,), (6,))

    assert anchor.tolist() == [[4, 1, 3, 5]]
    assert assignment.tolist() == [[1, 1, 1, 2, 0, 3]]


def test_a_penalty_keeps_a_row_where_it_is() -> None:
    penalty = torch.tensor([[0, 0, 5.0, 0, 5, 0]])
    _, anchor = bipartite(HAND, (1,), (6,), penalty=penalty, order="raster")

    assert anchor.tolist() == [[1, 2, 3, 4, 5]]


@pytest.mark.parametrize(
    ("order", "anchors"), [("grouped", [0, 2, 1, 3, 5]), ("similarity", [2, 0, 1, 3, 5]), ("raster", [0, 1, 2, 3, 5])]
)
def test_the_orders_of_the_output(order: Order, anchors: list[int]) -> None:
    assert bipartite(HAND, (1,), (6,), order=order)[1].tolist() == [anchors]


@given(problems())
def test_exactly_so_many_rows_go_and_nothing_is_lost(problem: Problem) -> None:
    metric, r, live, valid, protected, order = problem
    size = torch.rand(valid.shape, generator=torch.Generator().manual_seed(0)).add(0.5) * valid
    assignment, anchor = bipartite(metric, r, live, valid=valid, protected=protected, order=order)
    reduction = averaging(assignment, anchor, size)
    merged = reduction.mass(size)

    assert anchor.shape[1] == max(n - gone for n, gone in zip(live, r))
    assert (anchor >= 0).sum(1).tolist() == [n - gone for n, gone in zip(live, r)]
    assert torch.equal(assignment >= 0, valid)
    assert_close(merged.sum(1), size.sum(1))
    assert_close(
        (reduction.apply(metric) * merged[..., None]).sum(1), (metric * size[..., None]).sum(1), atol=1e-4, rtol=1e-4
    )


@given(problems())
def test_anchors_go_to_their_own_rows(problem: Problem) -> None:
    metric, r, live, valid, protected, order = problem
    assignment, anchor = bipartite(metric, r, live, valid=valid, protected=protected, order=order)

    for goes, rows in zip(assignment.tolist(), anchor.tolist()):
        assert [goes[row] for row in rows if row >= 0] == list(range(sum(row >= 0 for row in rows)))


@given(problems())
def test_protected_rows_stay_alone_and_first(problem: Problem) -> None:
    metric, r, live, valid, protected, order = problem
    assignment, anchor = bipartite(metric, r, live, valid=valid, protected=protected, order=order)

    for mask, goes, rows, gone in zip(valid, assignment, anchor, r):
        leading = mask.nonzero().flatten()[:protected].tolist()
        assert all((goes == goes[row]).sum() == 1 for row in leading)
        if order != "raster" or not gone:
            assert rows[:protected].tolist() == leading


@given(problems())
def test_a_sample_is_matched_as_if_it_were_alone(problem: Problem) -> None:
    metric, r, live, valid, protected, order = problem
    assignment, anchor = bipartite(metric, r, live, valid=valid, protected=protected, order=order)

    for sample, mask in enumerate(valid):
        places = mask.nonzero().flatten()
        if len(places) < 2:
            continue
        alone, kept = bipartite(
            metric[sample : sample + 1, mask], (r[sample],), (live[sample],), protected=protected, order=order
        )
        assert alone[0].tolist() == assignment[sample, mask].tolist()
        assert places[kept[0]].tolist() == [row for row in anchor[sample].tolist() if row >= 0]


@given(problems())
def test_in_raster_order_anchors_ascend(problem: Problem) -> None:
    metric, r, live, valid, protected, _ = problem
    _, anchor = bipartite(metric, r, live, valid=valid, protected=protected, order="raster")

    assert all(row == sorted(row) for row in ([place for place in rows if place >= 0] for rows in anchor.tolist()))


@given(problems())
def test_where_nothing_is_to_go_nothing_moves(problem: Problem) -> None:
    metric, r, live, valid, protected, order = problem
    _, anchor = bipartite(metric, (0,) * len(r), live, valid=valid, protected=protected, order=order)

    assert [[row for row in rows if row >= 0] for rows in anchor.tolist()] == [
        mask.nonzero().flatten().tolist() for mask in valid
    ]
