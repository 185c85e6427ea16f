"""What is drawn over a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from foveate.report.overlay import MISSED, SEEN, SIDE, beside, bounds, heat, merged, overlay, scaled

GRID = (2, 4)
RED = Image.new("RGB", (40, 20), (200, 60, 60))


def centre(drawn: Image.Image, cell: int) -> tuple[int, int, int]:
    """Colour in the middle of a cell."""
    row, column = divmod(cell, GRID[1])
    return drawn.getpixel(((2 * column + 1) * drawn.width // 8, (2 * row + 1) * drawn.height // 4))


def colours(drawn: Image.Image) -> set[tuple[int, ...]]:
    return {tuple(colour) for colour in np.asarray(drawn).reshape(-1, 3)}


def test_survivors_are_clear_and_the_others_dim() -> None:
    drawn = overlay(RED, GRID, np.array([0, 5]))

    assert max(drawn.size) == SIDE
    assert drawn.width == 2 * drawn.height
    assert [centre(drawn, cell) == (200, 60, 60) for cell in range(8)] == [cell in (0, 5) for cell in range(8)]


def test_dropped_cells_of_a_dark_picture_are_light() -> None:
    dark = Image.new("RGB", (40, 20), (20, 20, 20))

    assert sum(centre(overlay(dark, GRID, np.array([0])), 1)) > sum((20, 20, 20)) * 5


def test_evidence_is_framed_by_whether_it_is_there() -> None:
    evidence = np.zeros(GRID, dtype=bool)
    evidence[0, :2] = True

    half, whole, none = (colours(overlay(RED, GRID, np.array(alive, int), evidence)) for alive in ([0], [0, 1], []))
    assert {tuple(SEEN), tuple(MISSED)} <= half
    assert tuple(MISSED) not in whole
    assert tuple(SEEN) not in none


def test_tokens_that_live_on_in_one_have_its_colour() -> None:
    drawn = merged(RED, GRID, np.array([0, 0, 0, 3, 4, 5, -1, 5]))

    assert centre(drawn, 1) == centre(drawn, 2) != centre(drawn, 7)
    assert centre(drawn, 3) == (200, 60, 60)
    assert sum(centre(drawn, 6)) < 200


def test_heat_goes_from_dark_to_yellow_and_leaves_out_what_has_no_score() -> None:
    values = np.array([0, 0.2, 0.4, 0.6, 0.8, 1.0, np.nan, np.nan])
    drawn = heat(Image.new("RGB", (40, 20), "white"), GRID, values)
    green = [centre(drawn, cell)[1] for cell in range(6)]

    assert green == sorted(green)
    assert len(set(green)) == 6
    assert centre(drawn, 6) == centre(drawn, 7)


def test_one_outlier_does_not_take_all_colours() -> None:
    values = np.array([*np.linspace(0, 1, 99), 1000.0])

    low, high = bounds([values])
    assert high < 2
    assert scaled(values, low, high).max() == 1


def test_scores_that_are_all_the_same_are_drawn() -> None:
    low, high = bounds([np.full(8, 0.5)])

    assert np.isfinite(scaled(np.full(8, 0.5), low, high)).all()


@pytest.mark.parametrize("count", [1, 3])
def test_pictures_stand_next_to_each_other(count: int) -> None:
    assert beside([RED] * count, gap=8).size == (40 * count + 8 * (count - 1), 20)
