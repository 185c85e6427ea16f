"""HiPrune: the card's worked examples and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.signal import Columns, Site
from foveate.methods import HiPrune
from foveate.methods.before_llm.hiprune import Border, anchors_and_buffers, hierarchical
from foveate.ops.select import top_k
from tests.methods.bodiless import images, traits

BORDERS: tuple[Border, ...] = ("intersect", "clamp")


def peak(at: int, count: int = 16) -> Tensor:
    """``[1, N]`` 0.05 everywhere but 0.2 at one token."""
    return torch.full((1, count), 0.05).index_fill(1, torch.tensor([at]), 0.2)


RISING = torch.arange(16)[None] / 200


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, float, Border]:
    """Scores of two images without ties, width, budget, alpha, border."""
    rows, columns = draw(st.integers(1, 7)), draw(st.integers(1, 7))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    shape = (2, rows * columns)
    middle, output = (torch.rand(shape, generator=generator) for _ in range(2))
    budget = draw(st.integers(1, rows * columns))
    return middle, output, columns, budget, draw(st.floats(0, 1)), draw(st.sampled_from(BORDERS))


@pytest.mark.parametrize("border", BORDERS)
def test_the_worked_example(border: Border) -> None:
    kept = hierarchical(peak(5), RISING, columns=4, k=8, alpha=0.625, border=border)

    assert kept.tolist() == [[1, 4, 5, 6, 9, 13, 14, 15]]


def test_the_border_example_as_in_the_paper() -> None:
    kept = hierarchical(peak(3), RISING, columns=4, k=8, alpha=0.625, border="intersect")

    assert kept.tolist() == [[2, 3, 4, 7, 12, 13, 14, 15]]


def test_the_border_example_as_released() -> None:
    kept = hierarchical(peak(3), RISING, columns=4, k=8, alpha=0.625, border="clamp")

    assert kept.tolist() == [[0, 2, 3, 4, 7, 13, 14, 15]]


@pytest.mark.parametrize(("k", "anchors"), [(192, 4), (128, 3), (64, 1), (640, 13), (320, 6), (160, 3)])
def test_the_number_of_anchors_is_rounded_as_published(k: int, anchors: int) -> None:
    # Peaks in the middle layer far from each other, which the output layer ignores as it does their neighbours.
    side, peaks = 48, [(2 + 8 * (n // 6)) * 48 + 2 + 8 * (n % 6) for n in range(20)]
    middle = torch.zeros(1, side * side)
    middle[0, peaks] = torch.arange(20.0, 0.0, -1.0)
    output = torch.ones_like(middle).masked_fill(anchors_and_buffers(middle, side, 20), 0)
    kept = hierarchical(middle, output, side, k, alpha=0.1)

    assert torch.isin(torch.tensor(peaks), kept).sum() == anchors


@given(problems())
def test_it_keeps_exactly_the_budget_in_raster_order(problem: tuple[Tensor, Tensor, int, int, float, Border]) -> None:
    kept = hierarchical(*problem)

    assert kept.shape == (2, problem[3])
    assert kept.diff().gt(0).all()


@given(problems())
def test_every_anchor_is_kept(problem: tuple[Tensor, Tensor, int, int, float, Border]) -> None:
    middle, _, _, k, alpha, _ = problem
    anchors = top_k(middle, round(alpha * k / 5))

    for best, kept in zip(anchors.tolist(), hierarchical(*problem).tolist()):
        assert set(best) <= set(kept)


@given(problems())
def test_an_image_is_chosen_from_as_if_it_were_alone(problem: tuple[Tensor, Tensor, int, int, float, Border]) -> None:
    middle, output, *settings = problem
    alone = [hierarchical(middle[i : i + 1], output[i : i + 1], *settings) for i in range(2)]

    assert torch.equal(hierarchical(*problem), torch.cat(alone))


@given(problems())
def test_scaling_the_scores_changes_nothing(problem: tuple[Tensor, Tensor, int, int, float, Border]) -> None:
    middle, output, *settings = problem

    assert torch.equal(hierarchical(middle * 4, output * 0.25, *settings), hierarchical(*problem))


@given(problems())
def test_without_anchors_the_output_layer_decides(problem: tuple[Tensor, Tensor, int, int, float, Border]) -> None:
    middle, output, columns, k, _, border = problem
    best = top_k(output, k).sort(dim=1).values

    assert torch.equal(hierarchical(middle, output, columns, k, 0.0, border), best)


@given(problems())
def test_the_whole_budget_is_the_whole_image(problem: tuple[Tensor, Tensor, int, int, float, Border]) -> None:
    middle, output, columns, _, alpha, border = problem
    everything = torch.arange(middle.shape[1]).expand_as(middle)

    assert torch.equal(hierarchical(middle, output, columns, middle.shape[1], alpha, border), everything)


@given(problems(), st.integers(0, 5))
def test_each_anchor_brings_four_buffers_at_most(
    problem: tuple[Tensor, Tensor, int, int, float, Border], count: int
) -> None:
    middle, _, columns, _, _, border = problem
    first = anchors_and_buffers(middle, columns, count, border)

    assert first.gather(1, top_k(middle, count)).all()
    assert first.sum(1).le(5 * count).all()


@given(problems(), st.integers(0, 5))
def test_borders_differ_only_where_neighbours_lie_outside(
    problem: tuple[Tensor, Tensor, int, int, float, Border], count: int
) -> None:
    middle, _, columns, _, _, _ = problem
    last = middle.shape[1] - 1
    inside, clamped = (anchors_and_buffers(middle, columns, count, border) for border in BORDERS)

    for anchors, ours, released in zip(top_k(middle, count).tolist(), inside, clamped):
        neighbours = {anchor + step for anchor in anchors for step in (-1, 1, -columns, columns)}
        folded = {min(max(cell, 0), last) for cell in neighbours if not 0 <= cell <= last}
        assert set(released.nonzero().flatten().tolist()) == set(ours.nonzero().flatten().tolist()) | folded


def test_more_anchors_and_buffers_than_the_budget_are_cut_by_the_middle_layer() -> None:
    middle = peak(5)
    middle[0, [1, 9]] = torch.tensor([0.1, 0.15])
    # One anchor with four buffers for a budget of three: the anchor and its two best neighbours stay.
    assert hierarchical(middle, RISING, columns=4, k=3, alpha=1.0).tolist() == [[1, 5, 9]]


def test_it_reads_the_ninth_layer_of_clip_and_the_one_that_feeds_the_projector() -> None:
    assert HiPrune().reads(traits()) == (Columns(Site("encoder", 8)), Columns(Site("encoder", 22)))


def test_the_object_layer_is_the_same_share_of_other_depths() -> None:
    (middle, _) = HiPrune().reads(traits(encoder_layers=8, feature_layer=6))

    assert middle == Columns(Site("encoder", 2))


def test_the_object_layer_may_be_the_output_layer() -> None:
    method = HiPrune(object_layer=23)
    signals = method.reads(traits())
    chosen = method.select(images(4, 4, seen={signal: RISING for signal in signals}), 4)

    assert chosen.tolist() == [[12, 13, 14, 15]]


def test_an_object_layer_that_does_not_exist_is_refused() -> None:
    assert HiPrune(object_layer=25).check(traits()) == "object_layer=25: must be in 1..24"
    assert HiPrune(object_layer=24).check(traits()) is None


def test_a_model_without_encoder_signals_is_refused_with_what_works_instead() -> None:
    reason = HiPrune().check(traits(encoder_layers=None, feature_layer=None))

    assert reason is not None
    assert "use fastv, uniform or random" in reason
