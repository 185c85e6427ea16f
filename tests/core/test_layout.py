"""The ledger stays true through any sequence of edits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import VISUAL, Item, Role, last_of
from tests.core.strategies import gathers, merges, prompts, subsets

Data = st.DataObject


def pruned(layout: Layout, data: Data, positions: str = "anchor") -> Layout:
    """After dropping some rows; the method may know its counts or leave them to be counted."""
    keep = data.draw(subsets(layout.valid)) | torch.zeros_like(layout.valid).scatter(1, layout.last, True)
    live = tuple(keep.sum(1).tolist())
    visual = tuple((keep & layout.rows(*VISUAL)).sum(1).tolist())
    counted = data.draw(st.booleans())
    return layout.after(
        Edit(
            Reduction.keeping(keep, live if counted else None),
            positions,  # type: ignore[arg-type]
            live=live if counted else None,
            visual=visual if counted else None,
        )
    )


edits = st.integers(0, 3)


@given(prompts(), st.data(), edits)
def test_pruning_keeps_origins_unique_and_ascending(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data)

    for origin, valid in zip(layout.origin, layout.valid):
        assert origin[valid].diff().gt(0).all()
        assert valid.long().diff().ge(0).all()  # padding lies on the left


@given(prompts(), st.data(), edits)
def test_counts_on_the_host_are_those_of_the_tensors(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data)

    assert layout.live == tuple(layout.valid.sum(1).tolist())
    assert layout.visual == tuple(layout.rows(*VISUAL).sum(1).tolist())
    assert layout.dense == bool(layout.valid.all())


@given(prompts(), st.data(), edits)
def test_every_row_stays_what_it_was(before: Layout, data: Data, count: int) -> None:
    layout = before
    for _ in range(count):
        layout = pruned(layout, data)
    where = layout.origin.clamp(min=0)

    for name in ("role", "item", "ordinal", "size"):
        now, then = getattr(layout, name), getattr(before, name).gather(1, where)
        assert torch.equal(now[layout.valid], then[layout.valid]), name
    assert torch.equal(layout.positions[0][layout.valid], before.positions[0].gather(1, where)[layout.valid])


@given(prompts(), st.data(), edits)
def test_contiguous_positions_have_no_gaps(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data, "contiguous")

    for positions, valid, live in zip(layout.positions[0], layout.valid, layout.live):
        assert positions[valid].tolist() == list(range(live))


@given(prompts(rotary_rows=3), st.data())
def test_every_row_of_the_positions_follows(layout: Layout, data: Data) -> None:
    after = pruned(layout, data)

    assert after.positions.shape == (3, *after.shape)
    assert torch.equal(after.positions[0], after.positions[2])


def test_text_follows_the_longest_axis_of_an_image_whatever_row_numbers_the_tokens() -> None:
    visual, valid = torch.tensor([[False, True, True, True, True, False]]), torch.ones(1, 6, dtype=torch.bool)
    axes = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])[:, None]
    numbers = torch.arange(6).expand(1, 1, -1)
    layout = Layout.build(visual, valid, torch.cat([numbers, axes]), [[Item(2, 2, 0)]])
    kept = torch.tensor([[True, True, False, True, False, True]])

    whole = layout.after(Edit(Reduction.keeping(valid), text_after="follow"))
    ranked = layout.after(Edit(Reduction.keeping(kept), "rank"))

    assert torch.equal(whole.positions[1:], axes)
    assert ranked.positions[1:, 0].tolist() == [[0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3]]


@given(prompts(), st.data())
def test_positions_can_be_set(layout: Layout, data: Data) -> None:
    reduction = data.draw(gathers(layout.valid))
    positions = torch.arange(reduction.anchor.numel()).reshape(1, *reduction.anchor.shape)

    assert torch.equal(layout.after(Edit(reduction, positions)).positions, positions)


@given(prompts(), st.data(), edits)
def test_cells_are_those_of_the_raster(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data)

    for sample, items in enumerate(layout.items):
        for item, ordinal, cell in zip(layout.item[sample], layout.ordinal[sample], layout.yx[sample]):
            expected = divmod(int(ordinal), items[item].columns) if ordinal >= 0 else (-1, -1)
            assert tuple(cell.tolist()) == expected


@given(prompts(), st.data(), edits)
def test_survivors_of_each_image_are_listed_in_raster_order(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data)
    alive = layout.ordinals()

    assert [sum(map(len, images)) for images in alive] == list(layout.visual)
    for items, images in zip(layout.items, alive):
        for item, ordinals in zip(items, images):
            assert ordinals.diff().gt(0).all()
            assert ordinals.lt(item.count).all()


@given(prompts(), st.data())
def test_merging_hands_on_how_many_rows_a_row_stands_for(layout: Layout, data: Data) -> None:
    reduction = data.draw(merges(layout.valid))
    after = layout.after(Edit(reduction))

    assert torch.equal(after.size.sum(1), (layout.size * reduction.members().any(1)).sum(1))
    assert not after.size[~after.valid].any()


@given(prompts())
def test_an_unedited_prompt_is_as_it_was_read(layout: Layout) -> None:
    assert layout.visual == tuple(sum(item.count for item in items) for items in layout.items)
    assert torch.equal(layout.origin, torch.arange(layout.shape[1]).expand(layout.shape))
    for sample, items in enumerate(layout.items):
        for number, item in enumerate(items):
            rows = layout.rows(Role.IMAGE, item=number)[sample]
            assert layout.ordinal[sample, rows].tolist() == list(range(item.count))


def test_padding_is_neither_text_nor_image() -> None:
    visual = torch.tensor([[False, False, True, True, False]])
    valid = torch.tensor([[False, True, True, True, True]])
    layout = Layout.build(visual, valid, torch.arange(5)[None, None], [[Item(1, 2, 0)]])

    assert layout.role.tolist() == [[Role.PAD, Role.TEXT, Role.IMAGE, Role.IMAGE, Role.TEXT]]
    assert layout.size.tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]]
    assert (layout.live, layout.visual, layout.dense) == ((4,), (2,), False)


@given(prompts(), st.data(), edits)
def test_the_question_is_padded_on_the_left(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data)

    for rows, question in zip(layout.question_rows, layout.question):
        assert rows[rows >= 0].tolist() == question.nonzero().flatten().tolist()
        assert (rows >= 0).long().diff().ge(0).all()


@given(prompts(), st.data(), edits)
def test_the_last_row_is_no_padding(layout: Layout, data: Data, count: int) -> None:
    for _ in range(count):
        layout = pruned(layout, data)

    assert layout.last[:, 0].tolist() == [row.nonzero().max().item() for row in layout.valid]


def test_the_last_row_of_a_prompt_that_is_padded_on_the_right() -> None:
    visual = torch.zeros(2, 3, dtype=torch.bool)
    valid = torch.tensor([[True, True, False], [True, True, True]])
    layout = Layout.build(visual, valid, torch.zeros(1, 2, 3, dtype=torch.long), [[], []])

    assert layout.last.tolist() == [[1], [2]]


@given(prompts(), st.data(), edits)
def test_tokens_alive_are_counted_by_item(layout: Layout, data: Data, count: int) -> None:
    originals = layout.visual
    for _ in range(count):
        layout = pruned(layout, data)

    assert layout.alive == [[len(ordinal) for ordinal in sample] for sample in layout.ordinals()]
    assert layout.originals == originals


@given(prompts(), st.data())
def test_an_edit_that_says_what_it_leaves_of_each_item_is_believed(layout: Layout, data: Data) -> None:
    chosen = (data.draw(subsets(layout.valid)) & layout.rows(*VISUAL)) | layout.predicting
    ordinals = layout.after(layout.keeping(chosen, tuple(chosen.sum(1).tolist()))).ordinals()
    by_item = tuple(tuple(map(len, sample)) for sample in ordinals)
    after = layout.after(layout.keeping(chosen, tuple(map(sum, by_item)), by_item=by_item))

    assert after.by_item == by_item
    assert after.alive == [list(counts) for counts in by_item]


@given(prompts(), st.data())
def test_keeping_some_visual_rows_keeps_all_others(layout: Layout, data: Data) -> None:
    chosen = (data.draw(subsets(layout.valid)) & layout.rows(*VISUAL)) | layout.predicting
    counts = tuple(chosen.sum(1).tolist())
    edit = layout.keeping(chosen, counts, all_layers=True)
    after = layout.after(edit)

    assert edit.all_layers
    assert after.visual == counts == tuple(after.rows(*VISUAL).sum(1).tolist())
    assert after.live == tuple(after.valid.sum(1).tolist())
    kept = layout.valid & (chosen | ~layout.rows(*VISUAL))
    assert [o[v].tolist() for o, v in zip(after.origin, after.valid)] == [o[k].tolist() for o, k in zip(layout.origin, kept)]


def ending_in_its_picture(*, right: int = 0, answer: int = 0) -> Layout:
    """Two rows of text and six visual ones, then an answer and padding; the second sample ends in text."""
    rows = 8 + answer + right
    visual = torch.zeros(2, rows, dtype=torch.bool)
    visual[0, 2:8] = visual[1, 1:7] = True
    valid = torch.arange(rows).expand(2, -1) < 8 + answer
    told = valid & (torch.arange(rows) >= 8)
    items = [[Item(2, 3, 0)], [Item(2, 3, 1)]]
    positions = torch.arange(rows).expand(1, 2, -1)
    return Layout.build(visual, valid, positions, items, answer=told if answer else None)


@pytest.mark.parametrize(
    ("chosen", "kept"),
    [
        ([2, 4, 7], [0, 1, 2, 4, 7]),  # the row that predicts is among them
        ([2, 4, 5], [0, 1, 2, 4, 7]),  # it takes the place of the nearest
        ([], [0, 1, 7]),  # where all are to go, it stays
    ],
)
@pytest.mark.parametrize("padding", [0, 2])
def test_the_row_that_predicts_lives_within_the_budget(chosen: list[int], kept: list[int], padding: int) -> None:
    layout = ending_in_its_picture(right=padding)
    rows = torch.zeros(layout.shape, dtype=torch.bool)
    rows[0, chosen] = rows[1, 1] = True
    edit = layout.keeping(rows, (len(chosen), 1))
    after = layout.after(edit)

    assert (layout.pinned, after.pinned) == ((1, 0), (1, 0))
    assert after.origin[0, after.valid[0]].tolist() == kept
    assert after.origin[1, after.valid[1]].tolist() == [0, 1, 7]
    assert after.live == tuple(after.valid.sum(1).tolist())
    assert after.visual == tuple(after.rows(*VISUAL).sum(1).tolist())


def test_where_the_last_row_is_merged_the_one_that_is_now_last_takes_its_place() -> None:
    layout = ending_in_its_picture()
    keep = torch.zeros(layout.shape, dtype=torch.bool)
    keep[0, [0, 1, 3, 5]] = keep[1, [0, 2, 7]] = True

    after = layout.after(Edit(Reduction.keeping(keep)))
    assert after.origin.tolist() == [[0, 1, 3, 7], [-1, 0, 2, 7]]
    assert after.ordinal[0].tolist() == [-1, -1, 1, 3]  # it is still the token that it was


def test_answers_are_no_part_of_the_prompt() -> None:
    layout = ending_in_its_picture(answer=3, right=1)

    assert layout.live == (11, 11)
    assert layout.answers == (3, 3)
    assert layout.last.tolist() == [[7], [7]]
    assert layout.prompt.tolist() == [[True] * 8 + [False] * 4] * 2
    assert layout.question_rows[:, -1].tolist() == [7, 7]  # a row of text, or the row that predicts where there is none
    assert layout.without_answers.live == (8, 8)
    assert torch.equal(layout.without_answers.valid, layout.prompt)
    assert layout.keeping(layout.prompt, layout.visual).reduction.anchor.tolist() == [[*range(11)]] * 2


def test_the_last_rows_of_a_mask() -> None:
    rows = torch.tensor([[False, True, True, False, True], [False, False, False, True, False]])

    assert last_of(rows, 2).tolist() == [[2, 4], [-1, 3]]
    assert last_of(rows, 9).tolist() == [[-1, -1, 1, 2, 4], [-1, -1, -1, -1, 3]]


@given(prompts(), st.data())
def test_what_was_read_before_stands_in_front_as_text(layout: Layout, data: Data) -> None:
    count = data.draw(st.integers(0, 3))
    earlier = torch.arange(count).expand(len(layout.live), -1) > 0  # the first of each sample is padding
    whole = layout.behind(earlier, (max(count - 1, 0),) * len(layout.live))

    assert whole.shape == (layout.shape[0], count + layout.shape[1])
    assert whole.live == tuple(whole.valid.sum(1).tolist())
    assert torch.equal(whole.valid, torch.cat([earlier, layout.valid], dim=1))
    assert torch.equal(whole.rows(*VISUAL)[:, count:], layout.rows(*VISUAL))
    assert torch.equal(whole.last, layout.last + count)
