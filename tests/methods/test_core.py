"""CORE: the card's worked examples and limiting cases."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.reduction import Reduction
from foveate.methods.before_llm.core import alike, competition, merging
from foveate.ops.cluster import connected
from foveate.tasks.scenes import draw_scene
from tests import tiny
from tests.suite.bodies import BODIES, ONE

LABELS = torch.tensor([[0, 0, 1, 0, 1, 1]])
VALUES = torch.tensor([[[1.0], [3.0], [10.0], [5.0], [20.0], [60.0]]])


def merged(x: Tensor, label: Tensor, keep: int | None = None) -> Tensor:
    """What comes out for one picture ``x`` ``[1, n, D]``."""
    target, anchor, count = merging(label, None if keep is None else torch.tensor([keep]))
    weight = 1 / torch.bincount(target[0])[target]
    return Reduction.merging(target, weight, anchor[:, : int(count)]).apply(x)


def test_the_adaptive_example() -> None:
    x = torch.tensor([[[1.0, 0], [3, 0], [0, 2], [5, 0], [0, 4], [0, 6]]])
    masks = torch.zeros(2, 6)
    masks[0, [2, 4, 5]] = 1
    masks[1, [0, 1, 3]] = 1
    label = competition(masks.reshape(2, 2, 3), 2, 3)[None]

    assert label.tolist() == [[1, 1, 0, 1, 0, 0]]
    assert_close(merged(x, label), torch.tensor([[[3.0, 0], [0, 4]]]))


@pytest.mark.parametrize(
    ("keep", "expected"),
    [(5, [2, 10, 5, 20, 60]), (4, [3, 10, 20, 60]), (3, [3, 15, 60]), (2, [3, 30]), (6, [1, 3, 10, 5, 20, 60])],
)
def test_the_fixed_rate_example(keep: int, expected: list[float]) -> None:
    assert_close(merged(VALUES, LABELS, keep), torch.tensor(expected, dtype=torch.float)[None, :, None])


@given(st.integers(0, 999), st.integers(1, 9), st.integers(1, 24))
def test_exactly_the_budget_comes_out_and_nothing_is_lost(seed: int, objects: int, keep: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(objects, (1, 24), generator=generator)
    target, anchor, count = merging(label, torch.tensor([keep]))

    assert int(count) == keep
    assert sorted(set(target[0].tolist())) == list(range(keep))
    assert target.gather(1, anchor[:, :keep]).tolist() == [list(range(keep))]


@given(st.integers(0, 999), st.integers(1, 9))
def test_a_budget_of_one_for_each_object_is_the_adaptive_answer(seed: int, objects: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    label, x = torch.randint(objects, (1, 24), generator=generator), torch.randn(1, 24, 3, generator=generator)
    found = merged(x, label)

    assert_close(merged(x, label, found.shape[1]), found)
    # The order of the masks says nothing but ties of area, of which there are none to decide here.
    turned = torch.randperm(objects, generator=generator)[label]
    assert_close(merged(x, turned), found)


def test_every_cell_its_own_object_is_the_identity_and_one_object_is_the_mean() -> None:
    x = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(0))

    assert_close(merged(x, torch.arange(12)[None]), x)
    assert_close(merged(x, torch.zeros(1, 12, dtype=torch.long)), x.mean(1, keepdim=True))


def test_what_no_mask_covers_is_one_more_object() -> None:
    masks = torch.zeros(2, 2, 2)
    masks[0, 0, 0] = masks[1, 1, 1] = 0.2

    assert competition(masks, 2, 2).tolist() == [0, 2, 2, 1]


def test_cells_that_are_gone_go_nowhere() -> None:
    target, anchor, count = merging(torch.tensor([[0, -1, 0, 1, -1]]))

    assert target.tolist() == [[0, -1, 0, 1, -1]]
    assert (anchor.tolist(), count.tolist()) == ([[0, 3, -1, -1, -1]], [2])


def test_more_objects_than_tokens_join_their_neighbours_in_the_order_of_centroids() -> None:
    label = torch.tensor([[4, 3, 2, 1, 0]])

    assert merging(label, torch.tensor([2]))[0].tolist() == [[0, 0, 0, 1, 1]]


def test_neighbours_are_joined_around_corners() -> None:
    spiral = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [1, 0, 0, 0, 1], [1, 1, 1, 1, 1]])[None]
    x = torch.nn.functional.one_hot(spiral.flatten(1)).float()
    label = alike(x, torch.ones(1, 25, dtype=torch.bool), 5, 5, 0.5)

    assert label.reshape(5, 5).tolist() == torch.where(spiral[0] == 1, 0, 5).tolist()


@given(st.integers(0, 999), st.integers(1, 7), st.integers(1, 7))
def test_parts_are_those_of_a_search_from_cell_to_cell(seed: int, rows: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    right = torch.rand(1, rows, columns - 1, generator=generator) < 0.5
    down = torch.rand(1, rows - 1, columns, generator=generator) < 0.5
    part = list(range(rows * columns))

    def join(a: int, b: int) -> None:
        low, high = sorted((part[a], part[b]))
        part[:] = [low if number == high else number for number in part]

    for row, column in right[0].nonzero().tolist():
        join(row * columns + column, row * columns + column + 1)
    for row, column in down[0].nonzero().tolist():
        join(row * columns + column, (row + 1) * columns + column)
    assert connected(right, down).tolist() == [part]


GRID, PIXELS = 12, 96


def scene() -> tuple[dict[str, Tensor], np.ndarray]:
    """A prompt with a rendered scene of several things, and their masks."""
    drawn = draw_scene(np.random.default_rng(3), size=PIXELS)
    pixels = torch.from_numpy(drawn.pixels).permute(2, 0, 1)[None].float() / 255
    ids = torch.tensor([[1, 20, *[tiny.IMAGE] * GRID**2, 30, 31, 32]])
    return {"input_ids": ids, "pixel_values": pixels}, drawn.masks


@torch.no_grad()
def test_each_thing_of_a_scene_becomes_one_token() -> None:
    inputs, masks = scene()
    model = tiny.llava(grid=GRID)
    things = competition(torch.from_numpy(masks), GRID, GRID)
    projector = model.model.multi_modal_projector.linear_1
    features: list[Any] = []
    handle = projector.register_forward_pre_hook(lambda module, given: features.append(given[0]))
    with foveate.attach(model, "core") as session:
        with session.side(images={"masks": [masks]}):
            model.generate(**inputs, max_new_tokens=2, do_sample=False)
        fed, kept = features[-1], session.trace.alive(0)[0][0]
    model(**inputs)
    handle.remove()
    whole = features[-1]
    wanted = {int(label): whole[0, things == label].mean(0) for label in things.unique()}

    assert len(masks) > 2
    assert fed.shape[1] == len(kept) == len(wanted)
    for token, row in zip(fed[0], kept.tolist()):
        assert_close(token, wanted[int(things[row])])


@torch.no_grad()
def test_behind_a_tower_that_is_closed_things_are_merged_as_well() -> None:
    rows = torch.arange(16).reshape(4, 4)
    masks = torch.stack([rows < 6, rows >= 10]).float()
    body = BODIES["qwen2_5_vl"]
    with foveate.attach(body.model(), "core") as session, session.side(images={"masks": masks}):
        session.anatomy.model(**body.inputs(ONE))

    assert [kept.tolist() for kept in session.trace.alive(0)[0]] == [[2, 7, 12]]


def test_masks_of_another_shape_are_refused() -> None:
    inputs, masks = scene()
    refused = pytest.raises(FoveateError, match=r"core: masks=\(96, 96\): must be a tensor \[masks, height, width\]")
    with foveate.attach(tiny.llava(grid=GRID), "core") as session, session.side(images={"masks": [masks[0]]}), refused:
        session.anatomy.model(**inputs)
