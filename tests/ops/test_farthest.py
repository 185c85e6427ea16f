"""Farthest-first traversal is what brute force finds step by step."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import farthest
from foveate.ops.farthest import Metric, farthest_first


def at(*degrees: float) -> Tensor:
    """Unit vectors ``[1, n, 2]`` at angles."""
    angle = torch.tensor(degrees).deg2rad()
    return torch.stack([angle.cos(), angle.sin()], dim=-1)[None]


def distance(a: Tensor, b: Tensor, metric: Metric) -> float:
    if metric == "euclidean":
        return float((a - b).norm())
    return 1 - float(a @ b / (a.norm() * b.norm()))


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Points ``[2, N, 3]``, weights ``[2, N]``, and a number of tokens."""
    count = draw(st.integers(2, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    weight = torch.rand(2, count, generator=generator) + 0.1
    return torch.randn(2, count, 3, generator=generator), weight, draw(st.integers(1, count))


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("weighed", [False, True])
@given(problem=problems())
def test_every_step_takes_the_farthest(problem: tuple[Tensor, Tensor, int], metric: Metric, weighed: bool) -> None:
    points, weight, k = problem
    order = farthest_first(points, k, weight=weight if weighed else None, metric=metric)

    for point, own, chosen in zip(points.double(), weight.double(), order.tolist()):
        assert len(set(chosen)) == k
        every = torch.tensor([[distance(a, b, metric) for b in point] for a in point])
        nearest_other = (every + torch.eye(len(point)) * 99).amin(1)
        assert nearest_other[chosen[0]] >= nearest_other.max() - 1e-5
        for step, token in enumerate(chosen[1:], start=1):
            score = every[:, chosen[:step]].amin(1) * (own if weighed else 1)
            score[chosen[:step]] = -1
            assert score[token] >= score.max() - 1e-5


@given(problems())
def test_rows_by_themselves_are_the_rows_of_the_whole(problem: tuple[Tensor, Tensor, int]) -> None:
    points, weight, k = problem
    whole = farthest_first(points, k, weight=weight)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(farthest, "WORTH", 0)
        patch.setattr(farthest, "BLOCK", 2)
        assert torch.equal(farthest_first(points, k, weight=weight), whole)


def test_published_examples() -> None:
    # DivPrune's card and Prune2Drive's.
    assert farthest_first(at(0, 5, 10, 90, 100, 180), 3).tolist() == [[5, 0, 3]]
    assert farthest_first(at(0, 10, 90, 200), 4).tolist() == [[3, 1, 2, 0]]


def test_copies_come_last_and_only_once() -> None:
    order = farthest_first(torch.ones(1, 3, 2), 3)

    assert sorted(order[0].tolist()) == [0, 1, 2]
    assert farthest_first(at(0, 90, 0, 45), 4, first=torch.tensor([0])).tolist() == [[0, 1, 3, 2]]


def test_what_is_not_valid_is_neither_chosen_nor_a_neighbour() -> None:
    points = at(0, 90, 91, 180)
    valid = torch.tensor([[True, True, False, True]])

    assert farthest_first(points, 3, valid=valid).tolist() == [[0, 3, 1]]


def test_the_first_choices_for_more_are_the_choice_for_fewer() -> None:
    points = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))

    assert torch.equal(farthest_first(points, 20)[:, :5], farthest_first(points, 5))


def test_a_zero_vector_is_no_nan() -> None:
    points = at(0, 90, 180)
    points[0, 1] = 0

    assert sorted(farthest_first(points, 3)[0].tolist()) == [0, 1, 2]
    assert math.isclose(float(farthest.distances(points, points)[0, 1, 0]), 1)
