"""Uniform selection spreads tokens evenly over any grid."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.methods import Uniform
from foveate.methods.before_llm.uniform import stratified
from tests.methods.bodiless import images


@st.composite
def budgets(draw: st.DrawFn) -> tuple[int, int, int]:
    rows, columns = draw(st.integers(1, 24)), draw(st.integers(1, 24))
    return rows, columns, draw(st.integers(1, rows * columns))


@given(budgets())
def test_it_keeps_exactly_k_cells_in_raster_order(budget: tuple[int, int, int]) -> None:
    rows, columns, k = budget
    cells = stratified(rows, columns, k)

    assert len(cells) == k
    assert cells.diff().gt(0).all()
    assert 0 <= cells[0] <= cells[-1] < rows * columns


def unevenness(lines: Tensor, count: int) -> float:
    """How far the number of cells in the first lines strays from their share."""
    kept = torch.bincount(lines, minlength=count).cumsum(0)
    return float((kept - len(lines) * torch.arange(1, count + 1) / count).abs().max())


@given(budgets())
def test_rows_get_their_share_up_to_one_band(budget: tuple[int, int, int]) -> None:
    rows, columns, k = budget
    row = stratified(rows, columns, k) // columns

    assert unevenness(row, rows) <= torch.bincount(row).max()


@given(budgets())
def test_columns_get_their_share_up_to_half_a_cell_a_band(budget: tuple[int, int, int]) -> None:
    rows, columns, k = budget
    cells = stratified(rows, columns, k)

    assert unevenness(cells % columns, columns) <= 0.5 * len((cells // columns).unique()) + 1e-4


@given(budgets())
def test_bands_differ_by_one_cell_at_most(budget: tuple[int, int, int]) -> None:
    rows, columns, k = budget
    bands = torch.bincount(stratified(rows, columns, k) // columns)
    bands = bands[bands > 0]

    assert bands.max() - bands.min() <= 1


def test_a_quarter_of_a_square_is_every_second_cell_of_every_second_row() -> None:
    assert stratified(4, 4, 4).tolist() == [5, 7, 13, 15]


def test_a_tall_grid_is_covered_like_a_wide_one() -> None:
    assert stratified(100, 1, 4).tolist() == stratified(1, 100, 4).tolist()


def test_every_image_of_a_grid_gets_the_same_cells() -> None:
    kept = Uniform().select(images(3, 5, number=(0, 1, 0)), 6)

    assert kept.tolist() == [stratified(3, 5, 6).tolist()] * 3
