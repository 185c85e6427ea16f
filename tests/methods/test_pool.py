"""Pooling: the card's rule for the smaller grid, what is averaged, and where it stands."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import Pool
from foveate.methods.before_llm.pool import blocks, smaller_grid
from tests.methods.bodiless import layout, traits
from tests.suite.bodies import BODIES


@pytest.mark.parametrize(
    ("rows", "columns", "k", "smaller"),
    [(24, 24, 144, (12, 12)), (24, 24, 64, (8, 8)), (24, 24, 192, (13, 14)), (12, 24, 72, (6, 12)), (1, 50, 7, (1, 7)),
     (50, 1, 7, (7, 1)), (100, 2, 9, (9, 1)), (5, 5, 1, (1, 1)), (5, 5, 99, (5, 5))],
)  # fmt: skip
def test_the_grid_is_the_largest_of_its_shape(rows: int, columns: int, k: int, smaller: tuple[int, int]) -> None:
    assert smaller_grid(rows, columns, k) == smaller


@given(st.integers(1, 40), st.integers(1, 40), st.data())
def test_it_never_holds_more_than_it_may(rows: int, columns: int, data: st.DataObject) -> None:
    k = data.draw(st.integers(1, rows * columns))
    r, c = smaller_grid(rows, columns, k)
    assert 1 <= r <= rows
    assert 1 <= c <= columns
    assert r * c <= k


def test_blocks_are_even_and_hold_their_middles() -> None:
    block, middle = blocks(7, 3)
    assert block.tolist() == [0, 0, 1, 1, 2, 2, 2]
    assert middle.tolist() == [0, 2, 5]


def grid(rows: int, columns: int, frames: int = 1) -> Layout:
    """A prompt with a text row on either side of a grid."""
    return replace(layout(f"t{'1' * rows * columns}t"), items=((Item(rows, columns, 0, frames),),))


def test_each_block_is_averaged_and_stands_at_its_centre() -> None:
    before = grid(4, 4)
    x = torch.arange(18.0)[None, :, None]
    edit = Pool(most=4, positions="anchor").edit(Site("sequence"), x, before, {}, State())
    assert edit is not None

    assert edit.reduction.apply(x)[0, :, 0].tolist() == [0, 3.5, 5.5, 11.5, 13.5, 17]
    after = before.after(edit)
    assert after.ordinal[0].tolist() == [-1, 0, 2, 8, 10, -1]
    assert after.size[0].tolist() == [1, 4, 4, 4, 4, 1]
    assert after.positions[0, 0].tolist() == [0, 1, 3, 9, 11, 17]


def test_frames_are_pooled_one_by_one() -> None:
    x = torch.arange(10.0)[None, :, None]
    edit = Pool(most=2).edit(Site("sequence"), x, grid(4, 2, frames=2), {}, State())
    assert edit is not None
    assert edit.reduction.apply(x)[0, :, 0].tolist() == [0, 2.5, 6.5, 9]


def test_a_prompt_that_ends_in_its_picture_goes_on_from_its_last_row() -> None:
    prompt = replace(layout("t1111"), items=((Item(2, 2, 0),),))
    x = torch.arange(5.0)[None, :, None]
    edit = Pool(most=1, positions="anchor").edit(Site("sequence"), x, prompt, {}, State())
    assert edit is not None
    assert edit.reduction.anchor.tolist() == [[0, 4]]
    assert edit.reduction.apply(x)[0, :, 0].tolist() == [0, 2.5]


def test_whole_grids_are_needed() -> None:
    with pytest.raises(FoveateError, match=r"hiprune \+ pool: pool needs whole grids"):
        foveate.attach(BODIES["llava-clip"].model(), "hiprune(keep=9) + pool")


def test_contiguous_positions_are_refused_under_mrope() -> None:
    assert "multi-row" in str(Pool(positions="contiguous").check(traits(rotary_rows=3)))
