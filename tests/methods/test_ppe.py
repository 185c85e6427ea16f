"""PPE: the card's worked example, position tables, and what becomes of the sequence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import PPE
from foveate.methods.before_llm.ppe import position_table
from foveate.ops.cluster import members
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits

CLUSTER = torch.tensor([[0, 0, 1, 0, 1, 2]])
GRID = torch.tensor([[4] * 6, [4, 4, 4, 5, 5, 5], [4, 5, 6, 4, 5, 6]])[:, None]
"""Positions ``[3, 1, 6]`` of the card's grid of 2 x 3."""
PLAIN = traits(rotary_axes=(64,))
MROPE = traits(rotary_rows=3, rotary_axes=(16, 24, 24))


def edit(method: PPE, x: Tensor, before: Layout, model: Traits = PLAIN) -> Edit | None:
    state = State()
    state.put("session", "traits", model)
    return method.edit(Site("sequence"), x, before, {}, state)


def merge(method: PPE, x: Tensor, before: Layout, model: Traits = PLAIN) -> tuple[Layout, Tensor, Edit]:
    change = edit(method, x, before, model)
    assert change is not None
    return before.after(change), change.reduction.apply(x), change


def drawn(before: Layout, seed: int = 0) -> Tensor:
    return torch.randn(*before.shape, 4, generator=torch.Generator().manual_seed(seed))


def backwards(count: int) -> Tensor:
    return torch.arange(count - 1, -1, -1)[None]


def video(frames: int, rows: int, columns: int) -> Layout:
    """A video between two text rows."""
    count = frames * rows * columns
    visual = torch.tensor([[False, *[True] * count, False]])
    positions = torch.arange(count + 2)[None, None]
    return Layout.build(visual, torch.ones_like(visual), positions, [[Item(frames * rows, columns, 0, frames)]])


def test_the_worked_example() -> None:
    member = members(CLUSTER, backwards(6), count=3, slots=2)
    table = position_table(GRID.repeat_interleave(2, dim=0), member)

    assert member.tolist() == [[[3, 1], [4, 2], [5, 5]]]
    assert table[:, 0].tolist() == [[4, 4, 4], [4, 4, 4], [5, 5, 5], [4, 4, 5], [4, 5, 6], [5, 6, 6]]


def test_members_of_the_worked_example_repeat_cyclically() -> None:
    assert members(CLUSTER, backwards(6), 3, 4).tolist() == [[[3, 1, 0, 3], [4, 2, 4, 2], [5, 5, 5, 5]]]


@given(st.integers(1, 9), st.integers(1, 8))
def test_a_token_alone_fills_all_slots_with_its_own_position(count: int, slots: int) -> None:
    positions = torch.arange(3 * count).reshape(3, 1, count)
    member = members(torch.arange(count)[None], backwards(count), count, slots)

    assert torch.equal(position_table(positions.repeat_interleave(slots, 0), member), positions.repeat_interleave(slots, 0))


@given(prompts(rotary_rows=3), st.floats(0.1, 0.9), st.sampled_from([1, 2, 8]), st.integers(0, 99))
def test_text_stays_where_it_was(before: Layout, keep: float, capacity: int, seed: int) -> None:
    change = edit(PPE(keep=keep, capacity=capacity), drawn(before, seed), before, MROPE)
    if change is None:
        return
    after = before.after(change)

    assert after.positions.shape == (3 * capacity, *after.shape)
    for sample in range(before.shape[0]):
        then, now = (one.valid[sample] & (one.ordinal[sample] < 0) for one in (before, after))
        expected = before.positions[:, sample, then].repeat_interleave(capacity, dim=0)
        assert torch.equal(after.positions[:, sample, now], expected)
        values = change.reduction.apply(drawn(before, seed))[sample, now]
        assert torch.equal(values, drawn(before, seed)[sample, then])


@given(prompts(), st.floats(0.1, 1), st.integers(0, 99))
def test_each_image_keeps_its_share_where_it_stood(before: Layout, keep: float, seed: int) -> None:
    change = edit(PPE(keep=keep), drawn(before, seed), before)
    after = before if change is None else before.after(change)

    for sample, items in enumerate(before.items):
        runs = [[int(item) for item in one.item[sample][one.valid[sample]]] for one in (before, after)]
        kept = {number: math.ceil(keep * item.count) for number, item in enumerate(items)}
        assert {number: runs[1].count(number) for number in kept} == kept
        assert runs[1].count(-1) == runs[0].count(-1)
        assert [item for i, item in enumerate(runs[1]) if i == 0 or item != runs[1][i - 1]] == [
            item for i, item in enumerate(runs[0]) if i == 0 or item != runs[0][i - 1]
        ]
    assert after.live == tuple(after.valid.sum(1).tolist())
    assert after.visual == tuple(after.rows(*VISUAL).sum(1).tolist())


@given(prompts(rotary_rows=3), st.floats(0.1, 0.9), st.sampled_from(["index", "distance"]), st.integers(0, 99))
def test_a_sample_gets_in_a_batch_what_it_gets_alone(before: Layout, keep: float, order: Any, seed: int) -> None:
    method, x = PPE(keep=keep, order=order), drawn(before, seed)
    together = edit(method, x, before, MROPE)
    if together is None:
        return
    after, values = before.after(together), together.reduction.apply(x)

    for sample in range(before.shape[0]):
        own = slice(sample, sample + 1)
        alone = Layout.build(before.ordinal[own] >= 0, before.valid[own], before.positions[:, own], before.items[own])
        change = edit(method, x[own], alone, MROPE)
        if change is not None:
            one, valid = alone.after(change), after.valid[sample]
            assert torch.equal(after.positions[:, sample, valid], one.positions[:, 0, one.valid[0]])
            assert after.ordinal[sample, valid].tolist() == one.ordinal[one.valid].tolist()
            assert_close(values[sample, valid], change.reduction.apply(x[own])[0, one.valid[0]])


def test_a_merged_token_is_the_mean_of_its_members() -> None:
    before = layout("t111111111t")
    x = drawn(before)
    after, values, change = merge(PPE(keep=0.5), x, before)
    member = change.reduction.members()[0].float()

    assert after.live == (7,)
    assert_close(values[0], member @ x[0] / member.sum(1, keepdim=True))
    assert after.size.tolist() == [member.sum(1).tolist()]
    assert member.sum().item() == 11


def test_slots_hold_positions_of_members_and_nothing_else() -> None:
    before = layout("t111111111t")
    after, _, change = merge(PPE(keep=0.5, capacity=4), drawn(before), before)

    for row, member in enumerate(change.reduction.members()[0]):
        mine = before.positions[0, 0, member].tolist()
        expected = sorted(mine, reverse=True)
        assert after.positions[:, 0, row].tolist() == [expected[slot % len(mine)] for slot in range(4)]


def test_by_distance_the_centre_comes_first() -> None:
    before = layout("t111111111t")
    after, _, change = merge(PPE(keep=0.5, order="distance"), drawn(before), before)

    # the anchor of a merged token is its cluster's centre
    assert after.positions[0].tolist() == before.positions[0].gather(1, change.reduction.anchor).tolist()


def test_one_slot_is_the_position_of_one_member() -> None:
    before = layout("t111111111t")
    after, _, _ = merge(PPE(keep=0.5, capacity=1, order="distance", arrange="raster"), drawn(before), before)

    assert after.positions.shape == (1, 1, 7)
    assert after.positions[0, 0].tolist() == after.origin[0].tolist()


def test_merged_tokens_stand_by_score_or_in_raster_order() -> None:
    before = layout("t1111111111t")
    (by_score, _, _), (raster, _, _) = (
        merge(PPE(keep=0.6, arrange=arrange), drawn(before), before) for arrange in ("score", "raster")
    )

    assert raster.ordinal[0, 1:-1].diff().gt(0).all()
    assert sorted(by_score.ordinal[0, 1:-1].tolist()) == raster.ordinal[0, 1:-1].tolist()
    assert not by_score.ordinal[0, 1:-1].diff().gt(0).all()


def test_a_second_merge_takes_the_whole_table_of_one_member() -> None:
    before = layout("t111111111t")
    first, values, _ = merge(PPE(keep=0.6, capacity=4), drawn(before), before)
    second, _, change = merge(PPE(keep=0.6, capacity=4), values, first)

    tables = first.positions[:, 0].T.tolist()
    for row, member in enumerate(change.reduction.members()[0].tolist()):
        last = max(place for place, mine in enumerate(member) if mine)
        assert second.positions[:, 0, row].tolist() == tables[last]


def test_text_positions_in_front_of_the_axes_are_left_out() -> None:
    before = layout("t111111t")
    axes = torch.stack([before.positions[0], *[before.positions[0] * (10 + axis) for axis in range(3)]])
    before = Layout.build(before.ordinal >= 0, before.valid, axes, before.items)
    four = traits(rotary_rows=4, rotary_axes=(2, 2, 2))
    after, _, _ = merge(PPE(keep=0.5), drawn(before), before, four)

    assert after.positions.shape == (6, 1, 5)
    assert after.positions[:, 0, -1].tolist() == [70, 70, 77, 77, 84, 84]


def test_frames_of_a_video_are_clustered_on_their_own() -> None:
    before = video(frames=3, rows=2, columns=4)
    after, _, change = merge(PPE(keep=0.5), drawn(before), before)
    frame = before.ordinal[0] // 8

    assert after.visual == (12,)
    assert (after.ordinal[0, 1:-1] // 8).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    for row, member in enumerate(change.reduction.members()[0, 1:-1], start=1):
        assert frame[member].unique().tolist() == [frame[change.reduction.anchor[0, row]].item()]


def test_images_of_different_size_are_clustered_side_by_side() -> None:
    before = layout("t11112222222t", "..t11111111t.")
    after, _, _ = merge(PPE(keep=0.5), drawn(before), before)

    assert (after.live, after.visual) == ((8, 6), (6, 4))
    assert after.item.tolist() == [[-1, 0, 0, 1, 1, 1, 1, -1], [-1, -1, -1, 0, 0, 0, 0, -1]]


def test_the_whole_budget_is_no_edit() -> None:
    assert edit(PPE(keep=1.0), drawn(layout("t1111t")), layout("t1111t")) is None
    assert edit(PPE(keep=99), drawn(layout("t1111t")), layout("t1111t")) is None
    assert edit(PPE(), drawn(layout("tttt")), layout("tttt")) is None


def test_an_image_within_a_budget_of_tokens_stays_as_it_is() -> None:
    before = layout("t111t222222t")
    after, values, _ = merge(PPE(keep=3), drawn(before), before)

    assert after.visual == (6,)
    assert torch.equal(values[0, 1:4], drawn(before)[0, 1:4])
    assert after.ordinal[0, 1:4].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("axes", "slots"),
    [((16, 24, 24), 8), ((64,), 32), ((48,), 24), ((6,), 6), ((2, 2, 2), 2), ((4, 6, 6), 2), ((3, 2, 3), 1)],
)
def test_capacity_is_the_most_that_divides_every_axis(axes: tuple[int, ...], slots: int) -> None:
    assert PPE().slots(traits(rotary_axes=axes)) == slots


def test_a_capacity_that_does_not_divide_the_axes_is_refused() -> None:
    assert PPE(capacity=16).check(MROPE) == ("capacity=16: must divide 8, as the rotary axes have (16, 24, 24) frequencies")
    assert PPE(capacity=4).check(MROPE) is None
    assert PPE().check(MROPE) is None


def test_a_model_without_rotary_positions_is_refused() -> None:
    assert PPE().check(traits(rotary_axes=())) == "needs rotary positions, which llava has not"


def test_a_cascade_merges_before_its_layers_and_nowhere_else() -> None:
    assert PPE().sites(PLAIN) == (Site("sequence"),)
    assert PPE(layers=(11, 23)).sites(PLAIN) == (Site("decoder", 11), Site("decoder", 23))


def test_layers_that_do_not_exist_are_refused() -> None:
    assert PPE(layers=(11, 35)).check(PLAIN) == "layers=(11, 35): must be in 0..31"
    assert PPE(layers=(11, 31)).check(PLAIN) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"keep": 0},
        {"keep": 1.5},
        {"capacity": 0},
        {"neighbours": 0},
        {"order": "raster"},
        {"arrange": "index"},
        {"layers": (3, 2)},
        {"layers": (-1,)},
        {"layers": "11"},
    ],
)
def test_wrong_parameters_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=rf"ppe: {next(iter(wrong))}="):
        PPE(**wrong)
