"""How many tokens a budget keeps, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.budget import Budget
from foveate.core.errors import FoveateError

counts = st.integers(0, 5000)
keeps = st.integers(1, 6000) | st.floats(0, 1, exclude_min=True)
roundings = st.sampled_from(["round", "floor", "ceil"])


@given(keeps, roundings, counts)
def test_it_keeps_no_more_than_there_are_and_one_at_least(keep: int | float, rounding: Any, count: int) -> None:
    assert min(count, 1) <= Budget(keep, rounding).of(count) <= count


@given(st.integers(1, 6000), roundings, counts)
def test_a_count_is_kept_exactly_where_there_are_so_many(keep: int, rounding: Any, count: int) -> None:
    assert Budget(keep, rounding).of(count) == min(keep, count)


@given(st.floats(0, 1, exclude_min=True), st.integers(1, 5000))
def test_rounding_is_off_by_half_a_token_and_the_others_by_less_than_one(keep: float, count: int) -> None:
    wanted = keep * count

    assert abs(Budget(keep, "round").of(count) - wanted) <= 0.5 or wanted < 0.5
    assert 0 <= wanted - Budget(keep, "floor").of(count) < 1 or wanted < 1
    assert 0 <= Budget(keep, "ceil").of(count) - wanted <= 1


@given(keeps, roundings, counts)
def test_more_tokens_are_never_cut_to_fewer(keep: int | float, rounding: Any, count: int) -> None:
    budget = Budget(keep, rounding)

    assert budget.of(count) <= budget.of(count + 1)


def test_the_ratio_one_keeps_everything() -> None:
    assert Budget(1.0).of(577) == 577


def test_halves_are_rounded_to_even_down_or_up() -> None:
    halves = [Budget(0.5, "round").of(count) for count in (3, 5, 47)]

    assert halves == [2, 2, 24]
    assert [Budget(0.5, "floor").of(count) for count in (3, 5, 47)] == [1, 2, 23]
    assert [Budget(0.5, "ceil").of(count) for count in (3, 5, 47)] == [2, 3, 24]


@pytest.mark.parametrize("keep", [0, -1, 0.0, -0.5, 1.5, 1e9, math.inf, math.nan, True, None, "64"])
def test_anything_else_is_refused_with_value_and_remedy(keep: Any) -> None:
    with pytest.raises(FoveateError) as error:
        Budget(keep)

    assert str(error.value).startswith(f"keep={keep!r}: must be a positive count")
    assert "ratio in (0, 1]" in str(error.value)


@given(keeps, st.lists(counts, min_size=1, max_size=5))
def test_of_several_layers_it_keeps_a_count_of_each_or_a_ratio_of_all(keep: int | float, layers: list[int]) -> None:
    kept = Budget(keep).across(layers)

    if isinstance(keep, int):
        assert kept == sum(min(keep, count) for count in layers)
    else:
        assert kept == max(Budget(keep).of(sum(layers)), sum(count > 0 for count in layers))
    assert kept <= sum(layers)
