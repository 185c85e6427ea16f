from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from foveate.core.errors import FoveateError
from foveate.tune.evidence import Answered, Evidence, Interval, paired
from foveate.tune.goal import DROP, Goal
from foveate.tune.journal import FINISHED, PRUNED, Tried
from foveate.tune.search import candidates, give_up
from tests.tune.conftest import goal


def evidence(drop: float, prefill: float, spread: float = 0.03, kv: float = 1.0, n: int = 200) -> Evidence:
    shares = {"prefill": Interval(prefill, prefill, prefill), "kv": Interval(kv, kv, kv)}
    return Evidence(n, 0.9 - drop, 0.9, Interval(drop, drop - spread, drop + spread), shares)


def tried(number: int, found: Evidence, outcome: str = FINISHED) -> Tried:
    return Tried(number, f"recipe {number}", outcome, "", found)


def test_the_interval_of_a_drop_is_paired() -> None:
    rng = np.random.default_rng(0)
    before = (rng.random(500) < 0.6).astype(float)
    after = before.copy()
    after[:10] = 0

    found = paired(before, after)

    assert found.value == pytest.approx(np.mean(before - after))
    # Two independent samples of this size would leave 0.06 to either side.
    assert found.low < found.value < found.high < found.value + 0.02


@pytest.mark.parametrize("n", [50, 1500])
def test_equal_answers_prove_no_more_than_so_many_questions_can(n: int) -> None:
    found = paired([1.0] * n, [1.0] * n)

    assert found.value == 0
    assert 1 / n < found.high < 4 / n + 0.03


def test_costs_are_those_of_the_same_questions() -> None:
    answered = Answered((1.0, 0.0), (50.0, 50.0), {"prefill": (0.4, 0.6, 0.5)})

    found = Evidence.of(answered, Answered((1.0, 1.0, 0.0), (100.0, 100.0, 900.0)))

    assert found.drop.value == 0.5
    assert found.shares == {"prefill": Interval(0.5, 0.4, 0.6), "kv": Interval(0.5, 0.5, 0.5)}
    assert Evidence.of(answered + answered, answered + answered).n == 4


def test_a_trial_goes_on_while_there_is_hope() -> None:
    assert give_up(goal(), evidence(drop=0.07, prefill=0.5), []) is None


def test_a_trial_ends_when_its_drop_is_beyond_the_bound_for_certain() -> None:
    assert give_up(goal(), evidence(drop=0.09, prefill=0.5), []) == "drop beyond 0.05"


def test_a_trial_ends_when_it_saves_nothing() -> None:
    assert give_up(goal(), evidence(drop=0.0, prefill=1.1), []) == "saves nothing"


@pytest.mark.parametrize(
    ("rival", "behind"),
    [
        (evidence(drop=0.01, prefill=0.3), True),  # faster and better
        (evidence(drop=0.04, prefill=0.3), False),  # faster and worse, and its bound may not hold
        (evidence(drop=0.04, prefill=0.3, spread=0.005), True),  # faster, and within the bound for certain
        (evidence(drop=0.01, prefill=0.6), False),  # better and slower
        (evidence(drop=0.09, prefill=0.1, spread=0.05), False),  # out of the race
    ],
)
def test_a_trial_ends_when_it_is_slower_and_worse_than_one_that_is_finished(rival: Evidence, behind: bool) -> None:
    reason = give_up(goal(), evidence(drop=0.02, prefill=0.5), [tried(7, rival)])

    assert reason == ("behind #7" if behind else None)


def test_under_a_bound_on_the_cache_quality_counts() -> None:
    aim = Goal(DROP, "kv", 0.3)
    rival = tried(1, evidence(drop=0.02, prefill=1.0, kv=0.25))

    assert give_up(aim, evidence(drop=0.0, prefill=1.2, kv=0.31), []) == "kv beyond 0.3"
    assert give_up(aim, evidence(drop=0.0, prefill=1.2, kv=0.29), [rival]) is None
    assert give_up(aim, evidence(drop=0.03, prefill=1.2, kv=0.2), [rival]) is None
    assert give_up(aim, evidence(drop=0.03, prefill=1.2, kv=0.29), [rival]) == "behind #1"
    assert give_up(aim, evidence(drop=0.08, prefill=1.2, kv=0.1), [rival]) == "behind #1"


def test_the_saving_counts_as_much_as_the_chance_that_it_holds() -> None:
    known = [
        tried(0, evidence(drop=0.05, prefill=0.30)),  # an even chance
        tried(1, evidence(drop=0.01, prefill=0.33)),  # slightly slower, and it will hold
        tried(2, evidence(drop=0.00, prefill=0.90)),  # holds, and saves little
        tried(3, evidence(drop=0.06, prefill=0.10)),  # beyond the bound
        tried(4, evidence(drop=0.01, prefill=0.40), PRUNED),
    ]

    assert [each.number for each in candidates(goal(), known)] == [1, 4, 0, 2]


@pytest.mark.parametrize(
    "wrong",
    [
        {"bound": -0.1},
        {"bound": 1.0},
        {"target": "speed"},
        {"target": DROP, "bounded": "kv", "bound": 0.0},
        {"target": DROP, "bounded": "kv", "bound": 25},
    ],
)
def test_a_goal_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match="must be"):
        goal(**wrong)


def test_a_goal_that_was_never_timed_says_so() -> None:
    with pytest.raises(FoveateError, match="no answer is longer than one token"):
        goal(target="decode").wanted(evidence(drop=0.0, prefill=0.5))
