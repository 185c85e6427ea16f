"""PixelPrune: the card's limiting cases, its raster loop, and what a picture's own frames are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.signal import Site
from foveate.core.state import State
from foveate.engine.session import attach
from foveate.methods import PixelPrune
from foveate.methods.before_encoder.pixelprune import Metric, distance, predicted
from tests.methods.bodiless import traits
from tests.methods.test_index_preserving import grids
from tests.suite.bodies import BODIES, ONE
from tests.videos import prompt


def kept(picture: list[list[float]], **how: Any) -> list[list[int]]:
    """Where a cell stays, of a picture with one pixel a cell."""
    cells = torch.tensor(picture)[None, ..., None]
    gone = predicted(cells, torch.ones(cells.shape[:3], dtype=torch.bool), **how)[0]
    return (~gone).int().tolist()


def raster(cells: Tensor, threshold: float, metric: Metric, anchored: bool) -> tuple[Tensor, Tensor]:
    """The card's rule, cell by cell: what is kept, and what stands for each cell."""
    shown, keep = cells.clone(), torch.ones(cells.shape[:2], dtype=torch.bool)

    def near(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return bool(distance(shown[a], shown[b], metric) <= threshold)

    for r in range(cells.shape[0]):
        for c in range(cells.shape[1]):
            left, above, corner = (r, c - 1), (r - 1, c), (r - 1, c - 1)
            if r == 0 and c == 0:
                continue
            if r == 0 or c == 0:
                by = left if r == 0 else above
            else:
                by = above if near(corner, left) and not near(corner, above) else left
            if near((r, c), by):
                keep[r, c] = False
                if anchored:
                    shown[r, c] = shown[by]
    return keep, shown


def test_a_constant_picture_keeps_one_cell() -> None:
    assert kept([[7.0] * 4] * 4) == [[1, 0, 0, 0], *[[0] * 4] * 3]


def test_two_flat_halves_keep_a_cell_each() -> None:
    assert kept([[0, 0, 1, 1]] * 3) == [[1, 0, 1, 0], [0] * 4, [0] * 4]


def test_a_rectangle_keeps_the_starts_of_its_edges() -> None:
    flat = [0.0, 0, 0, 0]
    # Its corner; the ground behind its right end; the ground below its lower left corner. All else goes on by itself.
    assert kept([flat, [0, 1, 1, 0], [0, 1, 1, 0], flat]) == [[1, 0, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]]


def test_noise_keeps_everything() -> None:
    cells = torch.rand(1, 6, 5, 3, generator=torch.Generator().manual_seed(0))
    assert not predicted(cells, torch.ones(1, 6, 5, dtype=torch.bool)).any()


numbers = st.integers(0, 3)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 5).flatmap(lambda w: st.lists(st.lists(numbers, min_size=w, max_size=w), min_size=1, max_size=5)),
    st.sampled_from([0.0, 0.25, 0.34, 0.5]),
    st.sampled_from(["max", "mean", "rms"]),
    st.booleans(),
)
def test_it_is_the_raster_loop(picture: list[list[int]], threshold: float, metric: Metric, anchored: bool) -> None:
    value = torch.tensor(picture) / 4.0
    cells = torch.stack([value, value.flip(0)], dim=-1)
    keep, shown = raster(cells, threshold, metric, anchored)
    there = torch.ones(1, *keep.shape, dtype=torch.bool)
    assert torch.equal(~predicted(cells[None], there, threshold, metric, anchored)[0], keep)
    if anchored and metric == "max":
        assert float((cells - shown).abs().max()) <= threshold


def test_a_neighbour_that_is_gone_predicts_nothing() -> None:
    there = torch.ones(1, 1, 3, dtype=torch.bool)
    there[0, 0, 1] = False
    for threshold in (0.0, 0.5):
        assert predicted(torch.zeros(1, 1, 3, 1), there, threshold)[0, 0].tolist() == [False, False, False]


def test_pictures_of_a_batch_and_frames_of_a_video_are_pruned_on_their_own() -> None:
    layout = grids((2, 3), (4, 2, 2))
    cells = torch.zeros(*layout.shape, 3)
    edit = PixelPrune(std=(1.0, 1.0, 1.0)).edit(Site("patches"), cells, layout, {}, State())
    assert edit is not None
    assert [row[row >= 0].tolist() for row in layout.after(edit).ordinal] == [[0], [0, 4]]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_each_frame_of_a_flat_video_keeps_a_cell(family: str) -> None:
    model = BODIES[family].model()
    with attach(model, PixelPrune()) as session, torch.no_grad():
        model(**prompt(family, torch.zeros(1, 3, 3, 16, 24)))
    assert [len(item) for item in session.trace.alive(1)[0]] == [3]


def test_a_threshold_is_in_the_pictures_own_values() -> None:
    layout = grids((1, 2))
    cells = torch.tensor([[[0.0] * 3, [2.0] * 3]])  # 0.5 apart where the processor divided by 0.25
    assert PixelPrune(std=(0.25,) * 3, threshold=0.5).edit(Site("patches"), cells, layout, {}, State()) is not None
    assert PixelPrune(std=(0.25,) * 3, threshold=0.49).edit(Site("patches"), cells, layout, {}, State()) is None


def test_flat_pictures_are_hardly_encoded() -> None:
    body = BODIES["qwen2_5_vl"]
    model, inputs = body.model(), body.inputs(ONE)
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    with attach(model, PixelPrune()) as session, torch.no_grad():
        model(**inputs)
    assert session.report.visual_tokens[0] == 1


def test_it_needs_a_number_for_each_channel() -> None:
    open_site = traits(vision_sites=frozenset({"patches"}), cell=(3, 14, 14))
    assert "must be one for each of the 3 channels" in str(PixelPrune(std=(0.5,)).check(open_site))
