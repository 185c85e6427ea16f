"""VLM-Pruner: the card's worked examples and limiting cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.signal import KeyValue, Site
from foveate.core.state import State
from foveate.methods import VLMPruner
from foveate.methods.in_llm.vlm_pruner import folded, outwards
from tests.methods.bodiless import layout, traits

LAYER = Site("decoder", 2)
# Products of the card's example: 0.80, 0.78, 0.75 with the first token, 0.624 and 0.600 of the second with the others.
GRAM = torch.tensor([[1, 0.8, 0.78, 0.75], [0.8, 1, 0.624, 0.6], [0.78, 0.624, 1, 0.6], [0.75, 0.6, 0.6, 1]])
UNIT = torch.linalg.cholesky(GRAM)[None]
LINE = torch.tensor([[[0.0, 0], [0, 1], [0, 2], [0, 3]]]) / 17**0.5
ONE = torch.zeros(1, 4, dtype=torch.long)
FIRST = torch.tensor([[0]])


def walked(count: int, **options: Any) -> list[int]:
    kept = outwards(UNIT, LINE, ONE, FIRST, (count,), batch=1, **options)
    return kept[0].nonzero()[:, 0].tolist()


def run(method: VLMPruner, rows: Layout, x: Tensor, seed: int = 0) -> Edit:
    keys = torch.randn(x.shape[0], 2, x.shape[1], 4, generator=torch.Generator().manual_seed(seed))
    edit = method.edit(LAYER, x, rows, {KeyValue(Site("decoder", 1)): (keys, keys)}, State())
    assert edit is not None
    return edit


def drawn(rows: Layout) -> Tensor:
    return torch.randn(*rows.shape, 12, generator=torch.Generator().manual_seed(3))


def test_near_tokens_are_less_alike_than_they_are() -> None:
    ways = LINE[0, 1:, 1]
    alike = GRAM[0, 1:] * (1 + 0.5 * ways)

    assert_close(alike, torch.tensor([0.8970, 0.9692, 1.0229]), atol=1e-4, rtol=0)
    assert walked(2, tau=0.9) == [0, 1]
    # Behind the second token 0.8746 and 0.9319 are left: the third token is the nearer.
    assert walked(3, tau=0.9) == [0, 1, 2]


def test_the_published_code_gives_up_where_ours_relaxes() -> None:
    assert walked(2, tau=0.8, gives_up=True) == [0]
    assert walked(2, tau=0.8) == [0, 1]
    assert walked(4, tau=0.0, step=1.0) == [0, 1, 2, 3]


def test_without_the_way_the_least_alike_comes_first() -> None:
    assert walked(2, distance=0.0, tau=0.9) == [0, 3]
    far = outwards(UNIT, LINE.flip(1) * 7, ONE, FIRST, (2,), batch=1, distance=0.0)
    assert torch.equal(far, outwards(UNIT, LINE, ONE, FIRST, (2,), batch=1, distance=0.0))


def test_tokens_are_folded_as_in_the_worked_example() -> None:
    unit = torch.tensor([[[1.0, 0, 0], [0.6, 0.8, 0], [0.2, 0, 0.96**0.5]]])
    kept = torch.tensor([[True, False, False]])
    goes, weight = folded(unit, kept, torch.ones(1, 3).bool(), (1,), 0.3)
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]])

    assert goes.tolist() == [[0, 0, 0]]
    assert_close(weight[0] @ x, torch.tensor([0.3, 1.4]))


def test_what_is_opposite_to_all_that_stays_is_not_folded_in() -> None:
    unit = torch.tensor([[[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]])
    kept = torch.tensor([[True, False, True]])
    _, weight = folded(unit, kept, torch.ones(1, 3).bool(), (2,), 0.3)

    assert weight.tolist() == [[1.0, 0.0, 1.0]]


def test_pictures_have_distances_of_their_own() -> None:
    item = torch.tensor([[0, 1, 1, 1]])

    # Nothing of the second picture is kept: all of it is as far as can be, and the least alike comes first.
    assert outwards(UNIT, LINE, item, FIRST, (2,), batch=1)[0].nonzero()[:, 0].tolist() == [0, 3]


def test_exactly_the_budget_stays_in_its_order_and_a_batch_changes_nothing() -> None:
    prompts = "t1111111122222222ttt", "....t11111111111111t"
    rows = layout(*prompts)
    x, method = drawn(rows), VLMPruner(keep=0.4, batch=2, tau=0.1)
    edit = run(method, rows, x)
    out = edit.reduction.apply(x)
    keys = torch.randn(2, 2, 20, 4, generator=torch.Generator().manual_seed(0))
    for b, prompt in enumerate(prompts):
        seen: dict[Any, Any] = {KeyValue(Site("decoder", 1)): (keys[b : b + 1], keys[b : b + 1])}
        alone = method.edit(LAYER, x[b : b + 1], layout(prompt), seen, State())
        assert alone is not None
        there = edit.reduction.anchor[b] >= 0
        assert edit.reduction.anchor[b][there].tolist() == alone.reduction.anchor[0].tolist()
        assert_close(out[b][there], alone.reduction.apply(x[b : b + 1])[0])
        assert sorted(alone.reduction.anchor[0].tolist()) == alone.reduction.anchor[0].tolist()
    assert edit.visual == (6, 6)


@pytest.mark.parametrize("keep", [1, 3, 4])
def test_small_budgets_are_those_of_the_first_pivots(keep: int) -> None:
    rows = layout("t111111111111tt")
    few, more = (run(VLMPruner(keep=n), rows, drawn(rows)).reduction.anchor[0].tolist() for n in (keep, 9))

    assert len(few) == keep + 3
    assert set(few) <= set(more)


def test_nothing_is_folded_where_all_of_a_token_stays() -> None:
    rows = layout("t11111111t")
    x = drawn(rows)
    edit = run(VLMPruner(keep=5, blend=1.0), rows, x)

    assert edit.reduction.entries is None
    folding = run(VLMPruner(keep=5), rows, x)
    alone = (folding.reduction.members().sum(2) == 1)[0]
    assert torch.equal(folding.reduction.apply(x)[0, alone], edit.reduction.apply(x)[0, alone])
    assert not alone.all()


def test_a_row_that_predicts_is_kept() -> None:
    rows = layout("tt11111111")
    edit = run(VLMPruner(keep=1), rows, drawn(rows))

    assert edit.reduction.anchor.tolist() == [[0, 1, 9]]


def test_it_says_what_it_needs() -> None:
    rows = layout("t1111t")

    assert VLMPruner(keep=4).edit(LAYER, drawn(rows), rows, {}, State()) is None
    assert "layer=32: must be in 1..31" in str(VLMPruner(layer=32).check(traits()))
