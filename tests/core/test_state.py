"""What a method remembers lives as long as its scope, and its rows follow every edit."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.reduction import Reduction
from foveate.core.state import Scope, State
from tests.core.strategies import masks, reductions, values

SCOPES: tuple[Scope, ...] = ("prefill", "session")


def test_what_is_put_for_the_session_is_there_in_the_next_forward() -> None:
    session: dict[str, object] = {"seed": 3}
    State(session).put("session", "table", 5)
    State(session).put("prefill", "key", 7)

    assert [State(session).get("session", key) for key in ("seed", "table")] == [3, 5]
    assert State(session).get("prefill", "key") is None


def test_scopes_do_not_share_keys() -> None:
    state = State()
    for scope in SCOPES:
        state.put(scope, "key", scope)

    assert [state.get(scope, "key") for scope in SCOPES] == list(SCOPES)


def test_what_was_never_put_is_the_default() -> None:
    assert State().get("session", "seed", 7) == 7


@given(masks(), st.data())
def test_rows_follow_a_sequence_of_edits(alive: Tensor, data: st.DataObject) -> None:
    scores = data.draw(values((*alive.shape, 2), alive))
    first = data.draw(reductions(alive))
    second = data.draw(reductions(first.valid))
    state = State()
    state.put("prefill", "scores", scores, rows=True)
    state.compact(first)
    state.compact(second)

    assert torch.equal(state.get("prefill", "scores"), second.apply(first.apply(scores)))


def test_other_values_do_not_follow() -> None:
    state = State()
    state.put("prefill", "table", torch.ones(1, 3), rows=True)
    state.put("prefill", "table", torch.ones(1, 3))
    state.compact(Reduction.gather(torch.tensor([[0]]), inputs=3))

    assert state.get("prefill", "table").shape == (1, 3)
