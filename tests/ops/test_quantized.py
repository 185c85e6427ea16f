"""Numbers of a few bits: how far they are from what they stand for, how many bytes they take, and attention over them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.ops.quantized import Few, Quantized, apart, quantize, together
from tests.ops.plain import attention


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unturned(x: Tensor, positions: Tensor) -> Tensor:
    raise AssertionError("keys are held as they were cached")


def test_two_bits_by_hand() -> None:
    number, step, low = quantize(torch.tensor([[-1.0, 0.4, 0.6, 2.0], [5.0, 5.0, 5.0, 5.0]]), 2, -1)

    assert number.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert step.tolist() == [[1.0], [0.0]]
    assert low.tolist() == [[-1.0], [5.0]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_bytes_are_full(bits: int) -> None:
    numbers = torch.randint(0, 2**bits, (3, 5, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = together(numbers, bits)

    assert packed.shape == (3, 5, 16 * bits // 8)
    assert torch.equal(apart(packed, bits), numbers)


def test_the_first_number_has_the_lowest_bits() -> None:
    assert together(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00111001]


@given(
    bits=st.sampled_from([2, 4, 8]),
    dim=st.sampled_from([-1, -2]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_nothing_is_further_off_than_half_a_step(bits: int, dim: int, dtype: torch.dtype, seed: int) -> None:
    x = (random(2, 3, 16, 24, seed=seed) * 3).to(dtype)
    few = Few.of(x, bits, 8, dim)
    step = few.step.expand(*few.step.shape[:dim], 8, *few.step.shape[dim:][1:]).reshape(x.shape)
    # The step is rounded to the dtype, and so is what is rebuilt: of the largest number of a group.
    slack = torch.finfo(dtype).eps * 4 * x.abs().max()

    assert few.whole.dtype == dtype
    assert ((few.whole - x).abs() <= step / 2 + slack).all()


def test_an_outlier_among_keys_costs_its_own_channel_only() -> None:
    keys, values = random(1, 1, 32, 8), random(1, 1, 32, 8, seed=1)
    keys[..., 3] *= 100
    store = Quantized.of(keys, values, 2, 8)
    error = (store.rebuilt(unturned)[0] - keys).abs().amax(2)[0, 0]

    assert error[3] > 5
    assert error[[0, 1, 2, 4, 5, 6, 7]].max() < 1


def test_bytes_are_counted() -> None:
    store = Quantized.of(random(2, 3, 64, 128), random(2, 3, 64, 128), 2, 32)
    numbers, groups = 2 * 3 * 64 * 128, 2 * 3 * 64 * 128 // 32

    assert store.nbytes == 2 * (numbers // 4 + 2 * groups * 4)
    assert store.columns == 64


def test_groups_of_values_divide_their_width() -> None:
    store = Quantized.of(random(1, 2, 32, 20), random(1, 2, 32, 20), 8, 16)

    assert store.values.cut == (32, 5, 4)
    assert_close(store.rebuilt(unturned)[1], random(1, 2, 32, 20), atol=0.02, rtol=0)


@given(
    bits=st.sampled_from([2, 4, 8]),
    group=st.integers(1, 2),
    rows=st.integers(1, 3),
    later=st.integers(0, 4),
    padded=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_attention_is_that_over_what_is_rebuilt(
    bits: int, group: int, rows: int, later: int, padded: bool, seed: int
) -> None:
    there = torch.arange(16) < torch.tensor([[16], [8]]) if padded else None
    store = Quantized.of(random(2, 2, 16, 8, seed=seed), random(2, 2, 16, 8, seed=seed + 1), bits, 8, there)
    late = random(2, 2, later, 8, seed=seed + 2), random(2, 2, later, 8, seed=seed + 3)
    query, allowed = random(2, 2 * group, rows, 8, seed=seed + 4), random(2, 1, rows, later, seed=seed + 5) > 0
    early = torch.ones(2, 16, dtype=torch.bool) if there is None else there
    visible = torch.cat([early[:, None, None].expand(-1, 1, rows, -1), allowed], dim=-1)
    expected, _, mass = attention(query, store.rebuilt(unturned), late, visible, 0.3)

    assert_close(store.attend(query, *late, allowed, 0.3, unturned), expected, atol=1e-5, rtol=1e-5)
    assert_close(store.log_mass(query, 0.3, unturned), mass, atol=1e-5, rtol=1e-5)
    order = torch.tensor([1, 0, 1])
    again = store.batched(order)
    moved = again.attend(query[order], *(x[order] for x in late), allowed[order], 0.3, unturned)
    assert_close(moved, expected[order], atol=1e-5, rtol=1e-5)
    assert again.held == (32 / 3 if padded else 16)
