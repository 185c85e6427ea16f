"""DivPrune: the card's worked examples and invariants (farthest-first itself: `tests/ops`)."""

from __future__ import annotations

import torch

from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import DivPrune
from foveate.methods.before_llm.divprune import spread_out
from tests.methods.bodiless import layout, traits


def test_copies_are_kept_once_each() -> None:
    assert spread_out(torch.ones(1, 4, 2), torch.tensor([[0, 1, 3]]), [3]).tolist() == [[True, True, False, True]]


def test_a_sample_gets_in_a_batch_what_it_gets_alone() -> None:
    x = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([[-1, -1, -1, 2, 3, 4, 5], [0, 1, 2, 3, 4, 5, 6]])
    both = spread_out(x, rows, [2, 5])

    assert both.sum(1).tolist() == [2, 5]
    assert torch.equal(both[:1], spread_out(x[:1], rows[:1, 3:], [2]))
    assert torch.equal(both[1:], spread_out(x[1:], rows[1:], [5]))


def test_all_pictures_of_a_prompt_are_one_pool() -> None:
    prompt = layout("t11112222t")
    x = torch.zeros(1, 10, 2)
    x[0, 1:5] = torch.tensor([1.0, 0.0])  # one picture shows the same everywhere
    angles = torch.tensor([60.0, 120, 180, 240]).deg2rad()
    x[0, 5:9] = torch.stack([angles.cos(), angles.sin()], dim=1)
    edit = DivPrune(keep=5, positions="anchor").edit(Site("sequence"), x, prompt, {}, State())
    assert edit is not None

    kept = edit.reduction.anchor[0].tolist()
    assert [row for row in kept if 5 <= row < 9] == [5, 6, 7, 8]
    assert len(kept) == 2 + 5


def test_default_counts() -> None:
    assert [round(ratio * 576) for ratio in (0.098, 0.1)] == [56, 58]
    assert DivPrune().keep == 0.098


def test_it_may_act_later() -> None:
    assert DivPrune(layer=3).sites(traits()) == (Site("decoder", 3),)
    assert "must be in 0..31" in str(DivPrune(layer=32).check(traits()))
