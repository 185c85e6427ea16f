"""SCOPE: the card's worked example and invariants."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.signal import Attention, Columns, Features, Rows, Site
from foveate.methods import Scope
from foveate.ops.cover import greedy_cover
from tests.methods.bodiless import images, traits

EXAMPLE = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]])
SALIENCY = torch.tensor([[0.5, 0.2, 0.2, 0.1]])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Features ``[1, N, 5]`` and saliency ``[1, N]`` without ties."""
    count = draw(st.integers(1, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    features = torch.randn(1, count, 5, generator=generator)
    return features, torch.rand(1, count, generator=generator) + 0.01


alphas = st.sampled_from([0.0, 0.5, 1.0, 2.0])


def coverage(features: Tensor, order: Tensor) -> Tensor:
    """``[k]`` coverage of one image's tokens after each step of a selection."""
    unit = torch.nn.functional.normalize(features[0].double(), dim=-1)
    reached = (unit @ unit[order[0]].T).clamp(min=0).cummax(1).values
    return reached.sum(0)


@pytest.mark.parametrize(
    ("alpha", "selection", "covered"), [(1.0, [0, 2, 3], [1.8, 2.8, 3.8]), (0.0, [1, 3, 2], [2.4, 3.4, 3.8])]
)
def test_the_worked_example(alpha: float, selection: list[int], covered: list[float]) -> None:
    order = greedy_cover(EXAMPLE, SALIENCY, 3, alpha)

    assert order.tolist() == [selection]
    assert_close(coverage(EXAMPLE, order), torch.tensor(covered, dtype=torch.float64), atol=1e-6, rtol=0)


@given(problems(), alphas)
def test_coverage_never_falls(problem: tuple[Tensor, Tensor], alpha: float) -> None:
    features, saliency = problem
    order = greedy_cover(features, saliency, features.shape[1], alpha)

    assert coverage(features, order).diff().ge(-1e-9).all()


@given(problems())
def test_gains_of_pure_coverage_never_rise(problem: tuple[Tensor, Tensor]) -> None:
    features, saliency = problem
    covered = coverage(features, greedy_cover(features, saliency, features.shape[1], alpha=0.0))
    gains = torch.cat([covered[:1], covered.diff()])

    assert gains.diff().le(1e-5).all()


@given(problems(), alphas, st.sampled_from(["multiply", "add"]))
def test_the_whole_budget_takes_every_token_once(
    problem: tuple[Tensor, Tensor], alpha: float, combine: Literal["multiply", "add"]
) -> None:
    features, saliency = problem
    count = features.shape[1]

    assert greedy_cover(features, saliency, count, alpha, combine).sort().values.tolist() == [list(range(count))]


@given(problems(), alphas, st.data())
def test_a_smaller_budget_takes_the_first_of_a_larger_one(
    problem: tuple[Tensor, Tensor], alpha: float, data: st.DataObject
) -> None:
    features, saliency = problem
    count = features.shape[1]
    k = data.draw(st.integers(1, count))

    assert torch.equal(greedy_cover(features, saliency, k, alpha), greedy_cover(features, saliency, count, alpha)[:, :k])


@given(problems())
def test_saliency_does_not_matter_at_alpha_zero(problem: tuple[Tensor, Tensor]) -> None:
    features, saliency = problem
    count = features.shape[1]

    assert torch.equal(greedy_cover(features, saliency, count, 0.0), greedy_cover(features, saliency.flip(1), count, 0.0))


@given(problems(), alphas)
def test_uniform_saliency_is_pure_coverage(problem: tuple[Tensor, Tensor], alpha: float) -> None:
    features, saliency = problem
    count = features.shape[1]
    uniform = torch.full_like(saliency, 0.25)  # its powers are exact

    assert torch.equal(greedy_cover(features, uniform, count, alpha), greedy_cover(features, saliency, count, 0.0))


@given(problems(), alphas)
def test_scaling_the_saliency_changes_nothing(problem: tuple[Tensor, Tensor], alpha: float) -> None:
    features, saliency = problem
    count = features.shape[1]

    assert torch.equal(greedy_cover(features, saliency * 4, count, alpha), greedy_cover(features, saliency, count, alpha))


@given(problems(), st.data())
def test_shuffled_tokens_are_selected_alike(problem: tuple[Tensor, Tensor], data: st.DataObject) -> None:
    features, saliency = problem
    count = features.shape[1]
    # The last tokens cover what little is left, where float32 decides; the first half is clear.
    k = (count + 1) // 2
    shuffle = torch.tensor(data.draw(st.permutations(range(count))))
    order = greedy_cover(features[:, shuffle], saliency[:, shuffle], k)

    assert torch.equal(shuffle[order], greedy_cover(features, saliency, k))


def test_a_copy_is_taken_when_nothing_else_is_left_to_gain() -> None:
    copies = torch.eye(3)[[0, 0, 1, 2]][None]

    assert greedy_cover(copies, torch.tensor([[0.9, 0.9, 0.1, 0.2]]), 4).tolist() == [[0, 3, 2, 1]]


def test_of_equals_the_lowest_index_is_taken() -> None:
    assert greedy_cover(torch.eye(4)[None], torch.ones(1, 4), 4).tolist() == [[0, 1, 2, 3]]


def test_a_feature_of_zeros_covers_nothing_and_breaks_nothing() -> None:
    features = torch.cat([torch.zeros(1, 1, 2), EXAMPLE], dim=1)
    saliency = torch.cat([torch.ones(1, 1), SALIENCY], dim=1)

    assert greedy_cover(features, saliency, 3).tolist() == [[1, 3, 4]]


def test_an_image_is_chosen_from_as_if_it_were_alone() -> None:
    features = torch.cat([EXAMPLE, EXAMPLE.flip(1)])
    saliency = torch.cat([SALIENCY, SALIENCY])

    assert greedy_cover(features, saliency, 3)[:1].tolist() == greedy_cover(EXAMPLE, SALIENCY, 3).tolist()


def test_tokens_are_handed_on_in_raster_order() -> None:
    method, encoder = Scope(alpha=0.0), Site("encoder", 22)
    attention = Attention(SALIENCY[:, None, None].log(), torch.zeros(1, 1, 1))
    seen = {Features(): EXAMPLE, Rows(encoder, "cls"): attention}

    assert method.reads(traits()) == tuple(seen)
    assert method.select(images(2, 2, seen=seen), 3).tolist() == [[1, 2, 3]]


def test_attention_received_stands_in_for_cls() -> None:
    method, encoder = Scope(saliency="received"), Site("encoder", 22)
    seen = {Features(): EXAMPLE, Columns(encoder): SALIENCY}

    assert method.reads(traits(has_cls=False)) == tuple(seen)
    assert method.select(images(2, 2, seen=seen), 3).tolist() == [[0, 2, 3]]


def test_an_encoder_without_cls_is_refused_with_what_works_instead() -> None:
    reason = Scope().check(traits(has_cls=False))

    assert reason is not None
    assert "use scope(saliency='received')" in reason
    assert Scope(saliency="received").check(traits(has_cls=False)) is None
