"""Scales: the cards' numbers, what leaves a product as it is, and what a search is never worse than."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from foveate.ops.grid import Grid
from foveate.ops.scaling import (
    RATIOS,
    SHRINKS,
    Found,
    block_moments,
    clipped,
    equalising,
    scaled,
    search,
    smoothing,
)
from tests.blocks import GROUPS, drawn, trial

ATTENTION = GROUPS["attn"]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding(bits: int = 3, group: int = -1) -> Callable[[Tensor], Tensor]:
    return lambda weight: Grid.of(weight, bits, group).rounded(weight)


def test_the_cards_scales() -> None:
    size = torch.tensor([4.0, 1.0, 0.25])

    assert_close(equalising(size, 0.5), torch.tensor([2.0, 1.0, 0.5]))
    assert_close(equalising(size, 0.95), torch.tensor([3.732132, 1.0, 0.267943]))
    assert torch.equal(equalising(size, 0.0), torch.ones(3))
    assert equalising(torch.tensor([0.0, 1.0]), 0.5).isfinite().all()


def test_smoothing_by_hand() -> None:
    weights = [torch.tensor([[2.0, -1.0], [1.0, 2.0]]), torch.tensor([[-0.5, 8.0]])]

    assert_close(smoothing(torch.tensor([8.0, 2.0]), weights), torch.tensor([2.0, 0.5]))
    assert_close(smoothing(torch.tensor([8.0, 2.0]), weights, alpha=1), torch.tensor([8.0, 2.0]))
    assert smoothing(torch.tensor([0.0, 2.0]), [torch.zeros(1, 2)]).isfinite().all()


def test_a_scale_alone_leaves_the_product_as_it_is() -> None:
    x, weight, scale = random(2, 5, 16), random(8, 16, seed=1), random(16, seed=2).exp()

    assert_close(scaled(weight, scale, lambda w: w)(x), functional.linear(x, weight))
    assert_close(scaled(weight, scale, lambda w: w, activations=8)(x), functional.linear(x, weight), atol=0.4, rtol=0)


def found(heed: Tensor, power: float = 2.0, seed: int = 0) -> Found:
    block = trial(drawn(seed))
    (rows,) = block.exact(ATTENTION[0])
    weights = {name: block.weight(name) for name in ATTENTION}
    size = rows.x.abs().mean(0)
    return search(block.inspect(ATTENTION), weights, size, lambda part: heed, rounding(), power=power)


@pytest.mark.parametrize("seed", range(3))
def test_a_search_is_never_worse_than_no_scale(seed: int) -> None:
    got = found(torch.ones(2, 9), seed=seed)

    assert got.losses.min() == got.losses[RATIOS.index(got.ratio)]
    assert got.losses.min() <= got.losses[0]


def test_rows_that_weigh_nothing_do_not_count() -> None:
    only = torch.zeros(2, 9)
    only[1, 3] = 1
    block = trial(drawn())
    (part,) = block.inspect(ATTENTION)
    stands = {name: scaled(block.weight(name), torch.ones(32), rounding()) for name in ATTENTION}
    error = (part.run(part.x, stands) - part.run(part.x)).abs().mean(-1)

    assert_close(found(only, power=1).losses[0].float(), error[1, 3])
    assert_close(found(torch.ones(2, 9), power=1).losses[0].float(), error.sum())


@pytest.mark.parametrize("group", [-1, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clipping_is_least_among_its_shares(group: int, symmetric: bool) -> None:
    x, weight = random(40, 32) @ random(32, 32, seed=1), random(6, 32, seed=2)
    moments = block_moments([x[:7], x[7:]], group)
    parts = 1 if group == -1 else 32 // group

    def loss(grid: Grid) -> Tensor:
        error = (grid.rounded(weight) - weight).view(6, parts, -1)
        return torch.einsum("tgi,ogi->ogt", x.view(40, parts, -1), error).square().sum(-1)

    got = loss(clipped(weight, moments, 3, group, symmetric))
    assert (got <= loss(Grid.of(weight, 3, group, symmetric)) * (1 + 1e-4)).all()
    most = weight.view(6, parts, -1).abs().amax(-1, keepdim=True)
    for shrink in SHRINKS:
        limited = weight.view(6, parts, -1).clamp(-most * shrink, most * shrink).flatten(1)
        assert (got <= loss(Grid.of(limited, 3, group, symmetric)) * (1 + 1e-4)).all()
