"""Intervals hold what they promise, also where the plain bootstrap does not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from foveate.bench.statistics import beats, bootstrap, difference, interval, ratio, ratio_over
from foveate.core.statistics import wilson

SCORES = st.lists(st.floats(0, 1), min_size=1, max_size=40)


@given(st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=40))
def test_scores_of_0_and_1_have_wilson_s_interval(scores: list[float]) -> None:
    assert interval(scores) == wilson(sum(scores), len(scores))


@given(SCORES)
def test_an_interval_encloses_the_mean_and_stays_on_the_scale(scores: list[float]) -> None:
    low, high = interval(scores)

    assert -1e-9 <= low <= np.mean(scores) + 1e-9
    assert np.mean(scores) - 1e-9 <= high <= 1 + 1e-9


def test_a_difference_turned_round_is_its_negative() -> None:
    scores, others = np.random.default_rng(0).random((2, 100))

    there, back = difference(scores, others), difference(others, scores)
    assert there.mean == pytest.approx(-back.mean)
    # Both are drawn, so the ends agree about as well as 2,000 draws do.
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low), abs=0.01)


@given(SCORES)
def test_equal_scores_differ_by_nothing_beyond_noise(scores: list[float]) -> None:
    assert difference(scores, scores).mean == 0
    assert not difference(scores, scores).beyond_noise


def test_the_bootstrap_is_the_same_each_time() -> None:
    scores = np.random.default_rng(0).random(50)

    assert bootstrap(scores, (0, 1)) == bootstrap(scores, (0, 1))


def test_the_bootstrap_of_many_scores_is_about_two_standard_errors_wide() -> None:
    scores = np.random.default_rng(0).random(400)

    low, high = bootstrap(scores, (0, 1))
    assert (low, high) == pytest.approx(scores.mean() + np.array([-1.96, 1.96]) * scores.std() / 20, abs=4e-3)


@pytest.mark.parametrize(("n", "lost", "won"), [(50, 0.0, 0.01), (50, 0.05, 0.1), (200, 0.02, 0.0), (200, 0.4, 0.1)])
def test_nineteen_of_twenty_intervals_hold_the_true_difference(n: int, lost: float, won: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        drawn = rng.choice([1.0, -1.0, 0.0], p=[won, lost, 1 - won - lost], size=n)
        low, high = bootstrap(drawn, (-1, 1))
        held += low <= won - lost <= high

    assert held / 200 >= 0.92


def test_the_pairing_finds_a_small_loss_that_two_intervals_would_hide() -> None:
    rng = np.random.default_rng(0)
    plain = (rng.random(200) < 0.5).astype(float)
    pruned = plain * (rng.random(200) < 0.9)

    assert beats(plain, pruned)
    assert interval(pruned)[1] > interval(plain)[0]


def test_that_nothing_changed_does_not_prove_that_nothing_will() -> None:
    same = difference([1.0] * 100, [1.0] * 100)

    assert -0.04 < same.low < 0 < same.high < 0.04


def test_one_pair_has_a_ratio_and_no_interval() -> None:
    found = ratio([1.5])

    assert (found.value, found.low, found.high) == (pytest.approx(1.5), None, None)


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=9))
def test_a_ratio_is_the_median_and_its_interval_encloses_it(pairs: list[float]) -> None:
    found = ratio(pairs)

    assert found.value == pytest.approx(np.median(pairs))
    assert min(pairs) * (1 - 1e-9) <= found.low <= found.value <= found.high <= max(pairs) * (1 + 1e-9)


def test_the_interval_of_three_pairs_is_their_range() -> None:
    assert (ratio([1.0, 2.0, 1.2]).low, ratio([1.0, 2.0, 1.2]).high) == pytest.approx((1.0, 2.0))


def test_a_recipe_that_does_nothing_is_no_faster_beyond_noise() -> None:
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        found = ratio(np.exp(rng.normal(0, 0.2, 9)))
        missed += not found.low <= 1 <= found.high
    assert missed <= 0.1 * 200


def test_tasks_that_differ_are_seen_in_the_interval_of_their_mean() -> None:
    found = ratio_over([[2.0], [8.0]])

    assert (found.value, found.low, found.high) == pytest.approx((4, 2, 8))
