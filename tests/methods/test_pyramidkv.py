"""PyramidKV: the card's budgets in both readings, and the entries of each layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from foveate.core.errors import FoveateError
from foveate.methods import PyramidKV, SnapKV
from foveate.methods.kv_cache.pyramidkv import falling, pyramid
from tests.methods.bodiless import layout


def test_the_budgets_of_the_card() -> None:
    budgets = [pyramid(2048, 4096, 64, layer, 32, 20) for layer in range(32)]

    assert budgets[:3] + budgets[-2:] == [3994, 3868, 3743, 228, 102]
    assert sum(budgets) / 32 == 2048


def test_where_the_smallest_would_be_less_than_the_window_all_layers_keep_as_many() -> None:
    assert {pyramid(1024, 4096, 64, layer, 32, 20) for layer in range(32)} == {1024}


def test_a_straight_pyramid_is_cut_at_what_is_beside_the_window() -> None:
    assert [pyramid(60, 100, 10, layer, 4, 2) for layer in range(4)] == [90, 70, 50, 30]


@pytest.mark.parametrize(
    ("layer", "budget"),
    [(0, 32), (3, 20), (7, 4)],
)
def test_a_pyramid_falls_in_whole_steps(layer: int, budget: int) -> None:
    assert falling(16, 88, layer, 8, 20) == budget


def test_a_pyramid_is_cut_at_the_candidates() -> None:
    assert [falling(16, 20, layer, 3, 20) for layer in range(3)] == [20, 16, 12]


@given(st.integers(1, 30) | st.floats(0.01, 1), st.sampled_from(["kvpress", "original"]), st.sampled_from(["all", "visual"]))
def test_budgets_fall_and_are_the_budget_on_average(keep: int | float, reading: Any, tokens: Any) -> None:
    method = PyramidKV(keep=keep, window=3, beta=2, reading=reading, tokens=tokens)
    budgets = [method._count(30, layer, 5) for layer in range(5)]

    assert budgets == sorted(budgets, reverse=True)
    assert all(1 <= budget <= 30 for budget in budgets)
    wanted = min(keep, 30) if isinstance(keep, int) else keep * 30
    # Whole steps add up to two of a step's remainder at most, and a budget of none is one.
    assert abs(sum(budgets) / 5 - wanted) <= (0.5 if reading == "kvpress" else 4) + (wanted < 1)


def test_the_window_comes_on_top_in_the_original() -> None:
    method = PyramidKV(keep=20, window=4, beta=20, reading="original")

    assert [method._count(92, layer, 8) for layer in (0, 3, 7)] == [4 + 32, 4 + 20, 4 + 4]
    assert {method._count(31, layer, 8) for layer in range(8)} == {20}


@pytest.mark.parametrize("reading", ["kvpress", "original"])
def test_deeper_layers_keep_fewer_of_the_same_entries(reading: Any) -> None:
    method, prompt = PyramidKV(keep=0.4, window=4, beta=4, reading=reading), layout("t" * 40)
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    plans = [plan for plan in method.plan([scores] * 4, [prompt] * 4) if plan is not None]
    kept = [[set(head) for head in plan.entries[0].tolist()] for plan in plans]

    assert len(kept) == 4
    assert all(deep < shallow for more, less in pairwise(kept) for shallow, deep in zip(more, less))


def test_with_one_budget_for_all_it_is_snapkv() -> None:
    prompt, scores = layout("t" * 40), torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    (host,) = SnapKV(keep=0.3, window=16).plan([scores], [prompt])
    plans = PyramidKV(keep=0.3, window=16).plan([scores] * 3, [prompt] * 3)

    assert host is not None
    assert all(plan is not None and torch.equal(plan.entries, host.entries) for plan in plans)


def test_only_pictures_fall_where_only_they_may_go() -> None:
    prompt, scores = layout("tt" + "1" * 20 + "tttt"), torch.rand(1, 2, 26, generator=torch.Generator().manual_seed(0))
    method = PyramidKV(keep=0.5, window=4, beta=5, tokens="visual")
    plans = [plan for plan in method.plan([scores] * 3, [prompt] * 3) if plan is not None]

    assert [plan.counts for plan in plans] == [(6 + 18,), (6 + 10,), (6 + 2,)]
    assert all({0, 1, 22, 23, 24, 25} <= set(head) for plan in plans for head in plan.entries[0].tolist())


@pytest.mark.parametrize(("parameter", "value"), [("beta", 0), ("reading", "paper"), ("tokens", "text")])
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"pyramidkv: {parameter}="):
        PyramidKV(**{parameter: value})
