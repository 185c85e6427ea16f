"""What a method remembers lives as long as its scope, and its rows follow every edit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.reduction import Reduction
from foveate.core.state import Scope, State
from tests.core.strategies import masks, reductions, values

SCOPES: tuple[Scope, ...] = ("prefill", "request", "session")


def remembering_everywhere() -> State:
    state = State()
    for scope in SCOPES:
        state.put(scope, "key", scope)
    return state


@pytest.mark.parametrize(
    ("begun", "left"), [("prefill", ("request", "session")), ("request", ("session",)), ("session", ("prefill", "request"))]
)
def test_a_scope_that_begins_again_forgets(begun: Scope, left: tuple[Scope, ...]) -> None:
    state = remembering_everywhere()
    state.begin(begun)

    assert tuple(scope for scope in SCOPES if state.get(scope, "key")) == left


def test_scopes_do_not_share_keys() -> None:
    assert [remembering_everywhere().get(scope, "key") for scope in SCOPES] == list(SCOPES)


def test_what_was_never_put_is_the_default() -> None:
    assert State().get("session", "seed", 7) == 7


@given(masks(), st.data())
def test_rows_follow_a_sequence_of_edits(alive: Tensor, data: st.DataObject) -> None:
    scores = data.draw(values((*alive.shape, 2), alive))
    first = data.draw(reductions(alive))
    second = data.draw(reductions(first.valid))
    state = State()
    state.put("request", "scores", scores, rows=True)
    state.compact(first)
    state.compact(second)

    assert torch.equal(state.get("request", "scores"), second.apply(first.apply(scores)))


def test_other_values_do_not_follow() -> None:
    state = State()
    state.put("request", "table", torch.ones(1, 3), rows=True)
    state.put("request", "table", torch.ones(1, 3))
    state.compact(Reduction.gather(torch.tensor([[0]]), inputs=3))

    assert state.get("request", "table").shape == (1, 3)


def test_rows_that_are_forgotten_need_not_follow() -> None:
    state = State()
    state.put("prefill", "scores", torch.ones(1, 3), rows=True)
    state.begin("prefill")
    state.compact(Reduction.gather(torch.tensor([[0]]), inputs=7))

    assert state.get("prefill", "scores") is None
