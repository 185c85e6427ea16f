"""DART: the card's worked example and limiting cases, one pool or one for each grid."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.signal import Function, KeyValue, Signal, Site
from foveate.core.state import State
from foveate.methods import DART
from tests.methods.bodiless import layout, traits

LAYER = Site("decoder", 2)


def kept(method: DART, states: Tensor, keys: Tensor, *prompts: str) -> list[list[int]]:
    """Rows that stay; the norm changes nothing."""
    rows = layout(*prompts)
    seen: dict[Signal, Any] = {KeyValue(Site("decoder", 1)): (keys, keys), Function("norm"): lambda x: x}
    edit = method.edit(LAYER, states, rows, seen, State())
    assert edit is not None
    return [[row for row in sample if row >= 0] for sample in edit.reduction.anchor.tolist()]


def drawn(*prompts: str) -> tuple[Tensor, Tensor]:
    """States ``[B, N, 8]`` and keys ``[B, 2, N, 4]``."""
    generator = torch.Generator().manual_seed(0)
    shape = len(prompts), len(prompts[0])
    return torch.randn(*shape, 8, generator=generator), torch.randn(shape[0], 2, shape[1], 4, generator=generator)


def unit(*degrees: float) -> Tensor:
    return torch.tensor([[[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees]])


@pytest.mark.parametrize("prompt", ["t1111t", "1111tt"])
def test_the_worked_example(prompt: str) -> None:
    start = prompt.index("1")
    states, keys = torch.zeros(1, 6, 2), torch.zeros(1, 1, 6, 1)
    states[:, start : start + 4] = unit(0, 10, 90, 180)
    keys[0, 0, start : start + 4, 0] = torch.tensor([4.0, -3.0, 2.0, 1.0])
    (rows,) = kept(DART(keep=3, visual_pivots=1, text_pivots=0), states, keys, prompt)

    assert [row - start for row in rows if start <= row < start + 4] == [0, 2, 3]


def test_a_text_pivot_is_the_strongest_behind_the_picture() -> None:
    states = torch.cat([unit(180), unit(0, 90, 180, 270), unit(0, 90)], dim=1)
    keys = torch.tensor([9.0, 1.0, 1.0, 1.0, 1.0, 3.0, 2.0]).reshape(1, 1, 7, 1)

    # Least like 0 degrees, though the text before the picture has the largest key.
    assert kept(DART(keep=1, visual_pivots=0, text_pivots=1), states, keys, "t1111tt") == [[0, 3, 5, 6]]


def test_duplicates_of_a_pivot_are_the_last_to_be_chosen() -> None:
    states = unit(0, 0, 0, 90, 90, 90, 45, 0)
    keys = torch.tensor([5.0, 1.0, 1.0, 4.0, 1.0, 1.0, 1.0, 0.0]).reshape(1, 1, 8, 1)
    (rows,) = kept(DART(keep=4, visual_pivots=2, text_pivots=0), states, keys, "1111111t")

    # Two pivots; the first chooses two of the other group, the second two of the first's: the last choice goes.
    assert rows == [0, 3, 4, 5, 7]


def test_too_few_are_filled_up_by_norm() -> None:
    states = unit(10, 20, 30, 160, 170, 180, 0, 0, 0)
    states[0, 1] *= 3
    keys = torch.ones(1, 1, 9, 1)

    # A third of four, rounded, is one: three pivots choose one each.
    assert kept(DART(keep=4, visual_pivots=0, text_pivots=3, quota="round"), states, keys, "111111ttt") == [
        [1, 3, 4, 5, 6, 7, 8]
    ]


def test_everything_kept_is_no_edit() -> None:
    rows = layout("t1111t")

    assert DART(keep=4).edit(LAYER, torch.randn(1, 6, 4), rows, {}, State()) is None
    assert DART(keep=1.0, space="embedding").edit(Site("sequence"), torch.randn(1, 6, 4), rows, {}, State()) is None


@pytest.mark.parametrize("quota", ["ceil", "round"])
def test_a_prompt_gets_in_a_batch_what_it_gets_alone(quota: str) -> None:
    prompts = "t1111111111ttttt", "....tt111111112t"
    states, keys = drawn(*prompts)
    method = DART(keep=0.5, quota=quota)  # type: ignore[arg-type]
    both = kept(method, states, keys, *prompts)
    alone = [kept(method, states[b : b + 1], keys[b : b + 1], prompts[b])[0] for b in range(2)]

    assert both == alone
    assert [sum(prompt[row].isdigit() for row in rows) for prompt, rows in zip(prompts, both)] == [5, 4]


def test_in_the_embedding_space_each_grid_has_a_budget_of_its_own() -> None:
    rows = layout("t11111111t2222tt", "....t33333333ttt")
    x, _ = drawn("t11111111t2222tt", "....t33333333ttt")
    edit = DART(keep=0.5, space="embedding").edit(Site("sequence"), x, rows, {}, State())
    assert edit is not None

    assert edit.by_item == ((4, 2), (4,))
    assert rows.after(edit).alive == [[4, 2], [4]]
    assert torch.equal(rows.after(edit).positions[0, 0, -2:], rows.positions[0, 0, -2:])


def test_it_says_what_it_needs() -> None:
    with pytest.raises(FoveateError, match="visual_pivots=0: must be 1 or more without text_pivots"):
        DART(visual_pivots=0, text_pivots=0)
    assert "layer=32: must be in 1..31" in str(DART(layer=32).check(traits()))
    assert DART(space="embedding").sites(traits()) == (Site("sequence"),)
