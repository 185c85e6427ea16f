"""SCoRe: the card's worked example and limiting cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.methods.before_llm.score import salient_cover
from foveate.ops.farthest import farthest_first

TOKENS = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-1.0, 0.0]]])
SALIENCE = torch.tensor([[0.4, 0.3, 0.25, 0.1]])


@pytest.mark.parametrize(("alpha", "order"), [(0.8, [0, 2, 3]), (1, [0, 2, 3]), (0, [0, 3, 2]), (12, [0, 1, 2])])
def test_the_worked_example(alpha: float, order: list[int]) -> None:
    assert salient_cover(TOKENS, SALIENCE, 3, alpha).tolist() == [order]


@given(st.integers(0, 999), st.integers(1, 10), st.floats(1e-6, 1e6))
def test_only_the_ratio_of_saliences_counts(seed: int, count: int, factor: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens, salience = torch.randn(1, count, 4, generator=generator), torch.rand(1, count, generator=generator) + 0.1
    order = salient_cover(tokens, salience, count)

    assert order[0, 0] == salience[0].argmax()
    assert sorted(order[0].tolist()) == list(range(count))
    assert salient_cover(tokens, salience * factor, count).tolist() == order.tolist()


def test_equal_salience_is_farthest_point_sampling_from_the_first() -> None:
    tokens = torch.randn(1, 30, 4, generator=torch.Generator().manual_seed(0))
    plain = farthest_first(tokens, 8, first=torch.tensor([0]))

    assert torch.equal(salient_cover(tokens, torch.full((1, 30), 0.3), 8), plain)


def test_the_weighted_radius_is_the_score_at_alpha_one() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens, salience = torch.randn(1, 20, 4, generator=generator), torch.rand(1, 20, generator=generator)
    unit = torch.nn.functional.normalize(tokens[0], dim=1)
    distance = 1 - unit @ unit.T
    order = salient_cover(tokens, salience, 20, alpha=1)[0].tolist()
    radii = [float((salience[0] * distance[:, order[:step]].amin(1)).max()) for step in range(1, 20)]

    assert radii == sorted(radii, reverse=True)
    for step, radius in enumerate(radii, start=1):
        token = order[step]
        assert float(salience[0, token] * distance[token, order[:step]].min()) == pytest.approx(radius, abs=1e-6)
