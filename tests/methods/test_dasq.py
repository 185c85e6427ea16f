"""DASQ: the card's worked example, and what a decomposition may and may not do."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.weights import Replaced, Sparse
from foveate.engine.linears import values
from foveate.engine.quantize import quantize
from foveate.methods import DASQ
from foveate.methods.weights.dasq import CANDIDATES, Parts, added, decomposed, outliers
from foveate.ops.grid import Grid
from tests.tiny import llava

W = torch.tensor([[-1.0, -0.5, 0.0, 0.5, 1.0, 6.0]])


def random(*shape: int, seed: int = 0) -> Tensor:
    """Skewed: mostly small, some far out on one side."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(*shape, generator=generator)
    return weight + 8 * (torch.rand(*shape, generator=generator) < 0.01)


def made(parts: Parts) -> Tensor:
    return parts.grid.values(parts.integers) + parts.added * parts.scale


def plain(weight: Tensor, bits: int) -> Tensor:
    return Grid.searched(weight, bits, clips=CANDIDATES, narrow=True).rounded(weight)


def test_the_cards_example() -> None:
    dense = Grid(3, torch.tensor([[0.5]]), narrow=True).rounded(W)
    numbers, scale = added(W - dense, outliers((W - dense).abs(), 1 / 6, by_row=False), torch.tensor([[0.5]]), 7)

    assert dense.tolist() == [[-1.0, -0.5, 0.0, 0.5, 1.0, 1.5]]
    assert float((W - dense - numbers * scale).square().sum()) == 0.25
    assert float((W - Grid(3, torch.tensor([[2.0]]), narrow=True).rounded(W)).square().sum()) == 2.5
    assert decomposed(W, 3, density=1 / 6).error <= 0.25


def test_nothing_sparse_is_the_plain_grid() -> None:
    weight = random(6, 64)
    found = decomposed(weight, 3, density=0)

    assert Sparse.of(found.added, found.scale) is None
    assert found.error <= (plain(weight, 3) - weight).square().sum()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("by_row", [False, True])
def test_it_is_never_worse_than_the_plain_grid_and_far_better_with_outliers(bits: int, by_row: bool) -> None:
    for seed in range(3):
        weight = random(16, 128, seed=seed)
        found = decomposed(weight, bits, by_row=by_row)
        error = (plain(weight, bits) - weight).square().sum()
        assert_close(found.error, (made(found) - weight).square().sum())
        assert found.error < 0.6 * error


@pytest.mark.parametrize("by_row", [False, True])
def test_it_has_as_many_sparse_weights_as_it_may(by_row: bool) -> None:
    weight = random(16, 128)
    there = decomposed(weight, 3, density=0.02, by_row=by_row).added != 0

    assert int(there.sum()) <= int(0.02 * weight.numel())
    if by_row:
        assert int(there.sum(1).max()) <= int(0.02 * 128)
    size = torch.tensor([[3.0, 1.0, 3.0, 3.0], [2.0, 2.0, 0.0, 2.0]])
    assert outliers(size, 0.5, by_row=False).tolist() == [[True, False, True, True], [True, False, False, False]]
    assert outliers(size, 0.5, by_row=True).tolist() == [[True, False, True, False], [True, True, False, False]]


def test_steps_are_powers_of_two_apart_and_stored_exactly() -> None:
    found = decomposed(random(16, 128), 3, stored=torch.bfloat16)
    power = (found.scale / found.grid.scale).log2()

    assert torch.equal(power, power.round())
    assert torch.equal(found.scale, found.scale.to(torch.bfloat16).float())


def test_a_negated_weight_gives_the_negated_parts() -> None:
    weight = random(16, 128)

    assert torch.equal(made(decomposed(-weight, 3)), -made(decomposed(weight, 3)))


def test_integers_in_turn_are_the_product() -> None:
    """The card's form: one step for both products, the sparse one shifted."""
    weight, x = random(16, 128), torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    found = decomposed(weight, 3)
    shift = (found.scale / found.grid.scale)[:, 0]
    product = (x @ found.integers.float().T + shift * (x @ found.added.float().T)) * found.grid.scale[:, 0]

    assert_close(product, x @ made(found).T, rtol=1e-5, atol=1e-4)


def test_the_sparse_part_row_by_row_is_the_same_weight() -> None:
    weight = random(16, 128)
    found = decomposed(weight, 3)
    sparse = Sparse.of(found.added, found.scale, 4)

    assert isinstance(sparse, Sparse)
    assert_close(values(Replaced(found.grid, found.integers, sparse=sparse), torch.float32), made(found))
    assert sparse.index.dtype == torch.int16
    assert sparse.integers.dtype == torch.int8


@pytest.mark.parametrize("by_row", [False, True])
def test_on_disk_it_takes_what_its_entries_need_however_they_lie(by_row: bool) -> None:
    """3 bits, and for two weights in a hundred 4 and the 16 of where each is; steps and counts of rows come on top."""
    model = llava()
    size = quantize(model, DASQ(by_row=by_row)).numbers["size"]
    linears = [part for part in model.model.vision_tower.modules() if isinstance(part, torch.nn.Linear)]
    rows = sum(part.out_features for part in linears)

    assert 8 * size["sides"] <= 0.02 * size["weights"] * 20 + (16 + 32) * rows + 40 * len(linears)


def test_degenerate_weights() -> None:
    for weight in (torch.zeros(3, 40), torch.ones(3, 40), torch.full((1, 1), 2.0)):
        assert made(decomposed(weight, 3)).isfinite().all()


def test_it_quantizes_the_encoder_and_nothing_else() -> None:
    model = llava()
    artifact = quantize(model, DASQ(bits=4))
    names = [name for name in artifact.numbers if name.endswith("words")]

    assert names
    assert not any("gate" in name for name in names)


def test_groups_are_refused() -> None:
    with pytest.raises(FoveateError, match="group_size"):
        DASQ(group_size=32)  # type: ignore[arg-type]
