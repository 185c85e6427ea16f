"""Each step covers most, whichever way the gains are made."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops import cover
from foveate.ops.cover import Combine, all_at_once, greedy_cover, lazily

combines = st.sampled_from(["multiply", "add"])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Similarities ``[2, N, N]`` and weights ``[2, N]``, with copies and with few distinct numbers, and a budget."""
    count = draw(st.integers(1, 40))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    unit = torch.nn.functional.normalize(torch.randn(2, count, 4, generator=generator), dim=-1)
    unit = unit[:, torch.randint(draw(st.integers(1, count)), (count,), generator=generator)]
    similarity, weight = unit @ unit.mT, torch.rand(2, count, generator=generator)
    if draw(st.booleans()):
        similarity, weight = similarity.round(decimals=1), weight.round(decimals=1)
    return similarity, weight, draw(st.integers(1, count))


def naive(similarity: Tensor, weight: Tensor, k: int, combine: Combine) -> list[int]:
    """The definition, word for word, for one image."""
    covered, order = torch.zeros_like(weight), list[int]()
    for _ in range(k):
        gain = (similarity - covered).clamp(min=0).sum(1)
        score = gain * weight if combine == "multiply" else gain + weight
        score[order] = float("-inf")
        order.append(int((score == score.max()).nonzero()[0]))
        covered = torch.maximum(covered, similarity[order[-1]])
    return order


@given(problems(), combines)
def test_scores_made_on_demand_choose_as_the_definition_does(problem: tuple[Tensor, Tensor, int], combine: Combine) -> None:
    similarity, weight, k = problem

    for one, own in zip(similarity, weight):
        assert lazily(one, own, k, combine).tolist() == naive(one, own, k, combine)


@given(problems(), combines, st.integers(1, 5))
def test_scores_made_all_at_once_choose_as_the_definition_does(
    problem: tuple[Tensor, Tensor, int], combine: Combine, block: int
) -> None:
    similarity, weight, k = problem
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cover, "BLOCK", block)
        order = all_at_once(similarity, weight, k, combine)

    assert order.tolist() == [naive(one, own, k, combine) for one, own in zip(similarity, weight)]


@pytest.mark.parametrize("combine", ["multiply", "add"])
def test_a_large_picture_is_covered_as_by_definition(combine: Combine) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(20, 32, generator=generator)
    features = centres[torch.randint(20, (400,), generator=generator)] + torch.randn(400, 32, generator=generator)
    saliency = torch.rand(400, generator=generator)
    unit = torch.nn.functional.normalize(features, dim=-1, eps=1e-8)

    order = greedy_cover(features[None], saliency[None], 400, combine=combine)
    assert order[0].tolist() == naive(unit @ unit.T, saliency, 400, combine)


def test_most_scores_are_made_once() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(torch.randn(400, 32, generator=generator), dim=-1)
    made = 0

    def counting(rows: Tensor, *others: object) -> Tensor:
        nonlocal made
        made += len(rows)
        return scores(rows, *others)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        scores = cover._scores
        patch.setattr(cover, "_scores", counting)
        lazily(unit @ unit.T, torch.ones(400), 100, "multiply")

    assert made < 100 * 400 / 5
