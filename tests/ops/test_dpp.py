"""The greedy subset is the one that brute force finds step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.ops import dpp
from foveate.ops.dpp import greedy_map


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Features ``[2, N, D]``, quality ``[2, N]``, and a number of tokens within the rank of the features."""
    count, width = draw(st.integers(1, 9)), draw(st.integers(2, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    features = torch.randn(2, count, width, generator=generator)
    quality = torch.rand(2, count, generator=generator) + 0.1
    return features, quality, draw(st.integers(1, min(count, width)))


def kernel(features: Tensor, quality: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(features.double(), dim=-1)
    return quality.double()[:, :, None] * (unit @ unit.mT) * quality.double()[:, None]


@given(problems())
def test_every_step_takes_what_raises_the_determinant_most(problem: tuple[Tensor, Tensor, int]) -> None:
    order, _ = greedy_map(*problem)

    for matrix, chosen in zip(kernel(*problem[:2]), order.tolist()):
        for step, token in enumerate(chosen):
            others = [other for other in range(len(matrix)) if other not in chosen[:step]]
            volume = {other: matrix[[*chosen[:step], other]][:, [*chosen[:step], other]].det() for other in others}
            assert volume[token] >= max(volume.values()) * (1 - 1e-4) - 1e-12


@given(problems())
def test_the_gains_multiply_to_the_determinant(problem: tuple[Tensor, Tensor, int]) -> None:
    order, gains = greedy_map(*problem)

    for matrix, chosen, gain in zip(kernel(*problem[:2]), order, gains):
        assert_close(gain.double().prod(), matrix[chosen][:, chosen].det(), rtol=1e-2, atol=1e-7)


@given(problems())
def test_the_first_one_has_the_highest_quality(problem: tuple[Tensor, Tensor, int]) -> None:
    features, quality, k = problem

    assert torch.equal(greedy_map(features, quality, k)[0][:, 0], quality.argmax(1))


@given(problems())
def test_an_image_is_chosen_from_as_if_it_were_alone(problem: tuple[Tensor, Tensor, int]) -> None:
    features, quality, k = problem
    alone = [greedy_map(features[i : i + 1], quality[i : i + 1], k)[0] for i in range(2)]

    assert torch.equal(greedy_map(features, quality, k)[0], torch.cat(alone))


@given(problems())
def test_rows_made_on_demand_choose_as_the_stored_kernel_does(problem: tuple[Tensor, Tensor, int]) -> None:
    stored = greedy_map(*problem)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dpp, "WORTH", 0)
        made = greedy_map(*problem)

    assert torch.equal(made[0], stored[0])
    assert_close(made[1], stored[1])


@given(st.integers(2, 12), st.integers(1, 4), st.integers(0, 99))
def test_a_budget_beyond_the_rank_is_filled_up_without_repetition(count: int, width: int, seed: int) -> None:
    features = torch.randn(1, count, width, generator=torch.Generator().manual_seed(seed))
    order, gains = greedy_map(features, torch.ones(1, count), count)

    assert order.sort().values.tolist() == [list(range(count))]
    assert gains.isfinite().all()
    assert not gains[:, width:].any()


def test_equal_and_orthogonal_tokens_are_taken_by_index() -> None:
    order, gains = greedy_map(torch.eye(6)[None] * 3, torch.full((1, 6), 0.5), 4)

    assert order.tolist() == [[0, 1, 2, 3]]
    assert_close(gains.prod(), torch.tensor(0.5 ** (2 * 4)))


def test_a_copy_waits_until_all_distinct_tokens_are_taken() -> None:
    features = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    copied = torch.cat([features, features * 2])[None]
    quality = torch.tensor([[1.0, 0.9, 0.8, 0.05, 0.01]]).repeat(1, 2)

    order, gains = greedy_map(copied, quality, 10)
    assert sorted(order[0, :5] % 5) == [0, 1, 2, 3, 4]
    assert not gains[0, 5:].any()


def test_a_token_of_zeros_is_worth_nothing() -> None:
    features = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]])

    assert greedy_map(features, torch.tensor([[9.0, 1.0, 2.0]]), 3)[0].tolist() == [[2, 1, 0]]
