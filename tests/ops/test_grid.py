"""Grids: what their integers stand for, what a search finds, and how integers are packed."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.ops.grid import CLIPS, Grid, grouped, packed, spans, tokens, unpacked

KINDS = [pytest.param(*kind, id="-".join(map(str, kind))) for kind in product((2, 3, 4, 8), (-1, 16), (True, False))]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def test_two_bits_by_hand() -> None:
    weight = torch.tensor([[-1.0, 0.4, 0.6, 2.0]])

    assert Grid.of(weight, 2).integers(weight).tolist() == [[0, 0, 0, 1]]  # steps of 2, halves to even
    asymmetric = Grid.of(weight, 2, symmetric=False)
    assert asymmetric.integers(weight).tolist() == [[0, 1, 2, 3]]
    assert asymmetric.values(asymmetric.integers(weight)).tolist() == [[-1.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize(("bits", "group", "symmetric"), KINDS)
def test_integers_are_in_range_and_stand_for_what_was_rounded(bits: int, group: int, symmetric: bool) -> None:
    weight = random(6, 64)
    weight[1], weight[2], weight[3], weight[4, :16] = 0, 0.5, -0.5, 0
    grid = Grid.of(weight, bits, group, symmetric)
    integers = grid.integers(weight)
    least, most = grid.limits

    assert int(integers.min()) >= least
    assert int(integers.max()) <= most
    assert torch.equal(grid.values(integers), grid.rounded(weight))
    assert torch.equal(grid.integers(grid.rounded(weight)), integers)  # once on the grid, there to stay
    step = grid.scale.repeat_interleave(64 // grid.groups, 1)
    assert_close((grid.rounded(weight) - weight).abs().clamp(min=step / 2), step / 2)  # nothing is cut off
    assert not grid.rounded(weight)[1].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 8), (5, 1)])
def test_single_rows_and_columns(shape: tuple[int, int]) -> None:
    weight = random(*shape)

    assert Grid.of(weight, 4, symmetric=False).rounded(weight).isfinite().all()
    assert Grid.searched(weight, 4).rounded(weight).isfinite().all()


def test_a_search_is_least_among_its_clips_group_by_group() -> None:
    weight, importance = random(4, 32, dtype=torch.float64), random(32, seed=1, dtype=torch.float64).abs()
    for symmetric in (True, False):
        found = Grid.searched(weight, 3, 16, symmetric, importance=importance, power=2.4)
        low, high = spans(weight, 16)

        def loss(grid: Grid) -> Tensor:
            return grouped(importance * (grid.rounded(weight) - weight).abs() ** 2.4, 16).sum(-1)

        each = torch.stack([loss(Grid.between(low * clip, high * clip, 3, symmetric)) for clip in CLIPS])
        assert_close(loss(found), each.amin(0))


def test_importance_moves_the_grid_to_what_counts() -> None:
    weight = torch.tensor([[0.3, 1.0]])
    heeded = Grid.searched(weight, 2, importance=torch.tensor([1.0, 0.0])).rounded(weight)

    assert_close(heeded[0, 0], torch.tensor(0.3))
    assert_close(Grid.searched(weight, 2, importance=torch.tensor([0.0, 1.0])).rounded(weight)[0, 1], torch.tensor(1.0))


@pytest.mark.parametrize("symmetric", [True, False])
def test_slabs_change_nothing(symmetric: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, importance = random(7, 32), random(7, 32, seed=1).abs()
    for heed in (None, importance[0], importance):
        whole = Grid.searched(weight, 3, 16, symmetric, importance=heed)
        with monkeypatch.context() as patch:
            patch.setattr("foveate.ops.grid.SLAB", 70)
            apart = Grid.searched(weight, 3, 16, symmetric, importance=heed)
        assert torch.equal(whole.scale, apart.scale)
        assert symmetric or torch.equal(whole.rounded(weight), apart.rounded(weight))


def test_narrow_grids_negate() -> None:
    weight = random(4, 32)
    grid = Grid.searched(weight, 3, narrow=True)

    assert grid.limits == (-3, 3)
    assert torch.equal(Grid.searched(-weight, 3, narrow=True).rounded(-weight), -grid.rounded(weight))


@pytest.mark.parametrize("symmetric", [True, False])
def test_steps_are_rounded_to_the_dtype_that_stores_them(symmetric: bool) -> None:
    weight = random(4, 32)
    weight[0] *= 1e-12
    for grid in (make(weight, 3, 16, symmetric, stored=torch.bfloat16) for make in (Grid.of, Grid.searched)):
        assert torch.equal(grid.scale, grid.scale.to(torch.bfloat16).float())
        assert grid.rounded(weight).isfinite().all()


def test_groups_must_divide() -> None:
    with pytest.raises(FoveateError, match=r"group=128 does not divide the 192 inputs .* 64, 32, 16, 8, -1 does"):
        Grid.of(random(2, 192), 4, 128)


@pytest.mark.parametrize("symmetric", [True, False])
def test_activations_have_a_grid_for_each_row(symmetric: bool) -> None:
    x = random(2, 5, 64)
    x[0, 0] = 0
    y = tokens(x, 8, symmetric)

    assert_close(y, x, atol=0.05, rtol=0)
    assert torch.equal(tokens(x[:, 2:3], 8, symmetric), y[:, 2:3])
    assert max(len(row.unique()) for row in tokens(x, 3, symmetric).flatten(0, 1)) <= 8
    assert tokens(x, 16) is x


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 31, 32, 33, 100])
def test_packed_levels_come_back_and_leave_no_bit_between(bits: int, count: int) -> None:
    levels = torch.randint(0, 2**bits, (3, count), generator=torch.Generator().manual_seed(0))
    words = packed(levels, bits)

    assert words.shape == (3, -(-count * bits // 32))
    assert words.dtype == torch.int32
    assert torch.equal(unpacked(words, bits, count), levels.to(torch.uint8))


@pytest.mark.parametrize("bits", range(2, 9))
def test_packed_as_compressed_tensors_packs(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    levels = torch.randint(0, 2**bits, (5, 72), generator=torch.Generator().manual_seed(1))

    assert torch.equal(packed(levels, bits), helpers.pack_to_int32((levels - 2 ** (bits - 1)).to(torch.int8), bits))
