"""CoIn: the card's worked example and invariants."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from foveate.methods.before_llm.coin import covering, informativeness, unit_range
from foveate.ops.dpp import pivoted

TOKENS = torch.tensor([[[2.0, 0.0], [2.0, 0.1], [0.0, 1.0]]])
TEXT = torch.tensor([[1.0, 0.0]])
LAMBDA = 1e-3 / float(TOKENS.square().sum(2).mean())
"""The example's ridge, in mean squared norms."""


def drawn(count: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, count, width, generator=generator), torch.randn(1, width, generator=generator)


def test_informativeness_of_the_worked_example() -> None:
    info = informativeness(TOKENS, TEXT, 0.5)

    assert_close(info, torch.tensor([[0.99875, 0.99938, 0.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("scale", ["step", "raw"])
@pytest.mark.parametrize(("alpha", "order"), [(0.5, [1, 2]), (1.0, [1, 2])])
def test_the_worked_example(alpha: float, order: list[int], scale: str) -> None:
    info = informativeness(TOKENS, TEXT, 0.5)

    assert covering(TOKENS, info, 2, alpha, LAMBDA, scale).tolist() == [order]  # type: ignore[arg-type]


def test_without_volume_the_most_informative_stay() -> None:
    info = informativeness(TOKENS, TEXT, 0.5)

    assert covering(TOKENS, info, 2, 0.0, LAMBDA).tolist() == [[1, 0]]


def test_gains_add_up_to_the_log_determinant() -> None:
    x, _ = drawn(12, 8)
    ridge = torch.full((1, 1), 0.1)
    order, gains = pivoted(x, 6, torch.log, ridge)
    chosen = x[0, order[0]].double()

    assert_close(gains.log().sum().double(), torch.logdet(chosen @ chosen.T + 0.1 * torch.eye(6)), atol=1e-4, rtol=0)


def test_a_copy_adds_the_least_volume() -> None:
    x, _ = drawn(6, 8)
    x = torch.cat([x, x[:, :1]], dim=1)
    order = covering(x, torch.zeros(1, 7), 7, 1.0)[0].tolist()

    assert sorted(order) == list(range(7))
    assert order[-1] in (0, 6)


def test_turning_everything_changes_nothing_and_beta_one_ignores_the_text() -> None:
    x, text = drawn(20, 8)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
    info = informativeness(x, text, 0.5)

    assert_close(informativeness(x @ turn, text @ turn, 0.5), info, atol=1e-5, rtol=0)
    assert torch.equal(covering(x @ turn, info, 7, 0.5), covering(x, info, 7, 0.5))
    assert torch.equal(informativeness(x, text, 1.0), informativeness(x, -text, 1.0))


def test_equal_values_say_nothing() -> None:
    assert unit_range(torch.full((1, 4), 3.0)).tolist() == [[0.0] * 4]
