"""The arithmetic of the client in `benchmarks.serving`."""

from __future__ import annotations

import pytest
from benchmarks.serving import arrivals, split


def test_gaps_are_between_tokens_however_they_come():
    # The role, a first token, two together, a piece without one, and a last one.
    first, between = split(10.0, [(10.5, 0), (11.0, 1), (13.0, 3), (13.5, 3), (14.0, 4)])

    assert first == 1.0
    assert between == [1.0, 1.0, 1.0]
    assert split(0.0, [(2.0, 2), (3.0, 3)]) == (2.0, [0.0, 1.0])


def test_requests_arrive_at_the_rate():
    moments = arrivals(4.0, 20_001, seed=1)

    assert moments[0] == 0
    assert moments == sorted(moments) == arrivals(4.0, 20_001, seed=1)
    assert 20_000 / moments[-1] == pytest.approx(4.0, rel=0.03)
    assert arrivals(None, 3, seed=1) == [0, 0, 0]
