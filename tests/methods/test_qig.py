"""QIG: attributions by hand, and what they may and may not depend on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.methods import QIG
from foveate.methods.weights.qig import attributed, clipped, normalised
from tests.blocks import GROUPS, drawn, trial


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def linear(*weight: float) -> Tensor:
    return torch.tensor([weight])


def test_the_cards_linear_pair() -> None:
    exact, rounded = linear(1.0, 2.0), linear(1.0, 1.5)
    x, there = torch.tensor([[[3.0, 4.0], [1.0, -2.0]]]), torch.ones(1, 2, dtype=torch.bool)
    got = attributed(lambda at: at @ exact.T, lambda at: at @ rounded.T, x, torch.zeros_like(x), there)

    assert_close(got, torch.tensor([[2 / 3, 1 / 3]]))


def test_the_cards_clipping() -> None:
    there = torch.ones(2, 5, dtype=torch.bool)
    weights = torch.tensor([[0.1, 0.1, 0.1, 0.1, 0.6], [0.05, 0.10, 0.15, 0.20, 0.50]])
    wanted = torch.tensor([[0.2] * 5, [0.058824, 0.117647, 0.176471, 0.235294, 0.411765]])

    assert_close(clipped(weights, there), wanted, atol=1e-6, rtol=0)


def test_padding_weighs_nothing_and_changes_nothing() -> None:
    weights, there = random(1, 6).abs(), torch.tensor([[False, True, True, True, True, False]])
    alone = clipped(normalised(weights[:, 1:5], there[:, 1:5]), there[:, 1:5])
    among = clipped(normalised(weights, there), there)

    assert_close(among[:, 1:5], alone)
    assert not among[:, [0, 5]].any()


def test_no_error_at_all_weighs_all_rows_alike() -> None:
    x, there = random(2, 4, 3), torch.tensor([[True] * 4, [True, True, False, False]])
    got = attributed(lambda at: at * 2, lambda at: at * 2, x, torch.zeros_like(x), there)

    assert_close(clipped(got, there), torch.tensor([[0.25] * 4, [0.5, 0.5, 0.0, 0.0]]))


def test_a_larger_error_everywhere_changes_nothing_and_samples_do_not_mix() -> None:
    x, there = random(2, 5, 4), torch.ones(2, 5, dtype=torch.bool)
    weight, off = random(3, 4, seed=1), random(3, 4, seed=2)

    def found(x: Tensor, size: float) -> Tensor:
        return attributed(
            lambda at: at @ weight.T, lambda at: at @ (weight + size * off).T, x, torch.zeros_like(x), there[: len(x)]
        )

    assert_close(found(x, 1.0), found(x, 3.0))
    assert_close(found(x, 1.0)[1:], found(x[1:], 1.0))
    assert_close(found(x, 1.0).sum(1), torch.ones(2))


def test_a_path_from_what_quantized_blocks_make() -> None:
    case = drawn()
    block = trial(case)
    names = GROUPS["mlp"]
    (exact,), (part,) = block.inspect(names), block.inspect(names, "reached")
    for released in (False, True):
        method = QIG(bits=4, group_size=-1, symmetric=True, activations=8, released=released)
        weights = method.weigh(block, exact, part)
        assert_close(weights.sum(1), torch.ones(2))
        assert (weights >= 0).all()
    same = QIG(bits=4, group_size=-1, symmetric=True, activations=8).weigh(block, exact, exact)
    assert_close(same, torch.full_like(same, 1 / 9))  # a path of no length has no attributions
