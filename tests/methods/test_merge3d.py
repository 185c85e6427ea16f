"""Merge3D: the card's worked example and limiting cases, and a depth map on its way to the method."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit
from foveate.core.reduction import Reduction
from foveate.methods.before_llm.merge3d import back_projected, joined, nearest_main
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED

V = torch.tensor([[[1.0, 0], [0, 1], [1, 0], [1, 0]]])
G = torch.tensor([[[1.0, 0], [0, 1], [0, 1], [1, 0]]])
FUSED = torch.tensor([[[1.0, 1], [0, 2], [2, 2], [3, 1]]])
MAIN, ONE_GROUP = torch.tensor([[0, 1]]), torch.zeros(1, 4, dtype=torch.long)


@pytest.mark.parametrize(("geo_temperature", "expected"), [(1.0, [0, 0]), (0.5, [1, 0]), (1e9, [0, 0])])
def test_the_worked_example(geo_temperature: float, expected: list[int]) -> None:
    found = nearest_main(V, G, MAIN, ONE_GROUP, 1.0, geo_temperature)

    assert found[0, 2:].tolist() == expected


def test_main_tokens_are_themselves_plus_the_mean_of_what_joined_them() -> None:
    target = MAIN.gather(1, nearest_main(V, G, MAIN, ONE_GROUP, 1.0, 0.5))
    edit = joined(Edit(Reduction.gather(MAIN, 4)), target, torch.tensor([[False, False, True, True]]))

    assert edit.reduction.apply(FUSED).tolist() == [[[4.0, 2.0], [2.0, 4.0]]]


def test_without_meaning_space_alone_decides_and_without_geometry_meaning_alone() -> None:
    assert nearest_main(V, G, MAIN, ONE_GROUP, 1e9, 1.0)[0, 2:].tolist() == [1, 0]
    assert nearest_main(V, None, MAIN, ONE_GROUP)[0, 2:].tolist() == [0, 0]


def test_all_logits_by_one_factor_change_nothing_and_padding_is_joined_by_none() -> None:
    generator = torch.Generator().manual_seed(0)
    v, g = torch.randn(2, 600, 8, generator=generator), torch.randn(2, 600, 3, generator=generator)
    main, group = torch.tensor([[-1, 4, 9], [2, 5, 77]]), torch.zeros(2, 600, dtype=torch.long)
    found = nearest_main(v, g, main, group, 0.1, 0.2)

    assert torch.equal(nearest_main(v, g, main, group, 1.0, 2.0), found)
    assert int(found[0].min()) == 1
    by_hand = (v[1] @ v[1, main[1]].T / 0.1 + g[1] @ g[1, main[1]].T / 0.2).argmax(1)
    assert torch.equal(found[1], by_hand)


def test_tokens_join_their_own_group_only() -> None:
    group = torch.tensor([[0, 1, 1, 0]])

    assert nearest_main(V, G, MAIN, group)[0].tolist() == [0, 1, 1, 0]


def test_a_flat_wall_is_back_projected_to_a_flat_wall() -> None:
    points = back_projected(torch.full((5, 5), 2.0), focal=4.0)

    assert_close(points[0, 0], torch.tensor([-1.0, -1.0, 2.0]))
    assert_close(points[2, 2], torch.tensor([0.0, 0.0, 2.0]))


def of_scene() -> tuple[dict[str, Tensor], Tensor]:
    """A prompt with a picture that shows one texture everywhere, and its depth: the right half is far away."""
    texture = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1)).repeat(1, 8, 8)[None]
    depth = torch.ones(64, 64)
    depth[:, 32:] = 9.0
    ids = torch.tensor([[1, 20, *[tiny.IMAGE] * 64, 30, 31, 32]])
    return {"input_ids": ids, "pixel_values": texture}, depth


@torch.no_grad()
def test_what_lies_apart_in_space_is_not_merged() -> None:
    inputs, depth = of_scene()
    points = back_projected(depth, focal=64.0)
    recipe = "merge3d(keep=12, geometry='points', sem_temperature=100.0)"
    with foveate.attach(tiny.llava(grid=8), recipe) as session, session.side(images={"geometry": [points.numpy()]}):
        session.watch()
        session.anatomy.model.generate(**inputs, max_new_tokens=2, do_sample=False)
        (step,) = session.trace.steps
    members = step.reduction.members()[0, 2:14, 2:66].reshape(12, 8, 8)
    near, far = members[:, :, :4].flatten(1).any(1), members[:, :, 4:].flatten(1).any(1)

    assert session.report.visual_tokens[0] == 12
    assert bool((members.sum(0) == 1).all())  # nothing is lost, nothing is there twice
    assert bool((near ^ far).all())
    assert bool(near.any() & far.any())


@torch.no_grad()
def test_frames_of_a_video_have_their_own_geometry() -> None:
    grid = torch.tensor([[2, 8, 8]])
    video = torch.randn(2 * 64, 48, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[1, 20, *[tiny.VIDEO] * 32, 30, 31]])
    inputs: dict[str, Any] = {"input_ids": ids, "pixel_values_videos": video, "video_grid_thw": grid}
    inputs["mm_token_type_ids"] = (ids == tiny.VIDEO) * 2
    geometry = torch.zeros(2, 16, 16, 3)
    geometry[1] = 100.0  # the second frame is far from the first
    recipe = "merge3d(keep=8, geometry='points')"
    with foveate.attach(BODIES["qwen2_vl"].model(), recipe) as session, session.side(videos={"geometry": [geometry]}):
        session.watch()
        session.anatomy.model(**inputs)
        (step,) = session.trace.steps
    members = step.reduction.members()[0, 2:10, 2:34].reshape(8, 2, 16).any(2)

    assert session.report.visual_tokens[0] == 8
    assert bool((members.sum(1) == 1).all())


def test_without_geometry_it_is_refused_before_anything_runs() -> None:
    body = BODIES["llava-clip"]
    refused = pytest.raises(FoveateError, match="merge3d: needs side data 'geometry' of every image")
    with foveate.attach(body.model(), "merge3d") as session, refused:
        session.anatomy.model(**body.inputs(ONE))


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ([torch.zeros(4, 4)] * 4, r"geometry=\(4, 4\): must be \[H, W, d\]"),
        ([torch.zeros(4, 4, 3), *[torch.zeros(4, 4, 2)] * 3], r"pictures have \[2, 3\] values a place"),
    ],
)
def test_geometry_of_a_wrong_shape_is_refused(geometry: list[Tensor], message: str) -> None:
    body = BODIES["llava-clip"]
    refused = pytest.raises(FoveateError, match=message)
    with foveate.attach(body.model(), "merge3d") as session, session.side(images={"geometry": geometry}), refused:
        session.anatomy.model(**body.inputs(RAGGED))
