"""The waves are those of the transform's definition, in float64, and filters are of each sample's own length."""

from __future__ import annotations

from math import cos, pi, sqrt

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.ops import dct
from foveate.ops.dct import low_pass, waves


def matrix(rows: int) -> Tensor:
    """The orthonormal DCT-II ``[rows, rows]`` by its definition, in float64."""
    length = [sqrt((1 if m == 0 else 2) / rows) for m in range(rows)]
    entries = [[length[m] * cos(pi * (2 * x + 1) * m / (2 * rows)) for x in range(rows)] for m in range(rows)]
    return torch.tensor(entries, dtype=torch.float64)


def every(rows: int, batch: int = 1) -> Tensor:
    return torch.arange(rows).expand(batch, -1)


@given(st.integers(1, 40))
def test_waves_are_those_of_the_definition(rows: int) -> None:
    found = waves(every(rows), torch.tensor([rows]), torch.arange(rows))

    assert_close(found[0].double(), matrix(rows), atol=1e-6, rtol=0)


def test_a_long_sequence_has_exact_waves_at_its_end() -> None:
    rows, frequency = 40_000, 39_000
    found = waves(every(rows), torch.tensor([rows]), torch.tensor([frequency]))
    angle = pi * (2 * torch.arange(rows, dtype=torch.float64) + 1) * frequency / (2 * rows)

    assert_close(found[0, 0].double(), angle.cos() * sqrt(2 / rows), atol=1e-8, rtol=0)


def test_what_a_sample_lacks_is_zero() -> None:
    nth = torch.tensor([[-1, 0, 1, 2], [0, 1, 2, 3]])
    found = waves(nth, torch.tensor([3, 4]), torch.arange(4))

    assert_close(found[0, :3, 1:].double(), matrix(3), atol=1e-6, rtol=0)
    assert found[0, 3].tolist() == found[0, :, 0].tolist() == [0] * 4


@pytest.mark.parametrize(
    ("highest", "base"), [(0, [2.0] * 4), (1, [0.2929, 1.2929, 2.7071, 3.7071]), (3, [1.0, 1.0, 1.0, 5.0])]
)
def test_the_hand_example(highest: int, base: list[float]) -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 5.0])[None, :, None]
    found = low_pass(x, torch.ones(1, 4, dtype=torch.bool), [4], [highest])

    assert_close(found[0, :, 0], torch.tensor(base), atol=5e-5, rtol=0)


def test_the_coefficients_of_the_hand_example() -> None:
    found = waves(every(4), torch.tensor([4]), torch.arange(4))[0] @ torch.tensor([1.0, 1.0, 1.0, 5.0])

    assert_close(found, torch.tensor([4.0, -2.6131, 2.0, -1.0824]), atol=5e-5, rtol=0)


@given(st.integers(1, 30), st.integers(0, 29), st.sampled_from([1, 3, 128]), st.integers(0, 999))
def test_it_is_the_transform_without_its_high_frequencies(rows: int, highest: int, chunk: int, seed: int) -> None:
    x = torch.randn(2, rows, 3, generator=torch.Generator().manual_seed(seed))
    kept = matrix(rows)[: highest + 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dct, "CHUNK", chunk)
        found = low_pass(x, torch.ones(2, rows, dtype=torch.bool), [rows] * 2, [highest] * 2)

    assert_close(found.double(), kept.T @ (kept @ x.double()), atol=1e-5, rtol=1e-5)


@given(st.lists(st.booleans(), min_size=1, max_size=12), st.integers(0, 12), st.integers(0, 999))
def test_rows_that_are_none_have_no_say(drawn: list[bool], highest: int, seed: int) -> None:
    rows = torch.tensor([drawn, [True] * len(drawn)])
    x = torch.randn(2, len(drawn), 2, generator=torch.Generator().manual_seed(seed))
    found = low_pass(x.masked_fill(~rows[..., None], float("nan")), rows, [sum(drawn), len(drawn)], [highest, 2])
    alone = low_pass(x[:1, rows[0]], rows[:1, rows[0]], [sum(drawn)], [highest])

    assert_close(found[:1, rows[0]], alone)
    assert not found[0, ~rows[0]].any()


def test_a_large_mean_does_not_drown_small_waves() -> None:
    wave = torch.randn(1, 50, 1, generator=torch.Generator().manual_seed(0))
    inside = torch.ones(1, 50, dtype=torch.bool)
    plain, far = (x - low_pass(x, inside, [50], [10]) for x in (wave, wave + 1000))

    assert_close(far, plain, atol=1e-3, rtol=0)


def test_all_frequencies_are_the_rows_themselves() -> None:
    x = torch.randn(1, 7, 2, generator=torch.Generator().manual_seed(0))

    assert torch.equal(low_pass(x, torch.ones(1, 7, dtype=torch.bool), [7], [6]), x)
