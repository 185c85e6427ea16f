"""FEATHER: the card's hand examples and invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Hidden, Site
from foveate.core.state import State
from foveate.methods import Feather
from foveate.methods.in_llm.feather import image_scores, strided
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits
from tests.methods.llama import random_query_key

ROW = torch.tensor(
    [0.010, 0.020, 0.030, 0.040, 0.050, 0.060, 0.070, 0.080, 0.085, 0.100, 0.110, 0.120, 0.015, 0.025, 0.035, 0.095]
)


def picture(rows: int, columns: int, after: int = 1) -> Layout:
    """One text row, an image, some text rows."""
    width = 1 + rows * columns + after
    visual = ((torch.arange(width) > 0) & (torch.arange(width) <= rows * columns))[None]
    return Layout.build(visual, torch.ones_like(visual), torch.arange(width)[None, None], [[Item(rows, columns, 0)]])


def scored(scores: Tensor) -> Any:
    """A layer in which the last row's logits are ``scores`` ``[B, N]``: keys of one dimension, queries of one."""

    def function(x: Tensor, layout: Layout, rope: bool = True) -> tuple[Tensor, Tensor]:
        assert not rope
        return torch.ones(*scores.shape, 1)[:, None], scores[:, None, :, None]

    return function


def edit(method: Feather, prompt: Layout, layer: Any, stage: int = 0, hidden: Tensor | None = None) -> Edit | None:
    fit = method.fitted(traits())
    assert fit.layers is not None
    number = fit.layers[stage]
    before = torch.zeros(*prompt.shape, 1) if hidden is None else hidden
    seen = {Hidden(Site("decoder", number - 1)): before, Function("query_key", number - 1): layer}
    return fit.edit(Site("decoder", number), before, prompt, seen, State())


def ordinals(prompt: Layout, change: Edit | None) -> list[int]:
    after = prompt if change is None else prompt.after(change)
    return after.ordinal[after.ordinal >= 0].tolist()


def hand(scores: Tensor) -> Any:
    return scored(torch.nn.functional.pad(scores, (1, 1))[None])


@pytest.mark.parametrize(
    ("kappa", "kept"),
    [
        (0.3, [0, 3, 9, 10, 11, 12, 15]),
        (0.5, [0, 3, 5, 6, 7, 8, 9, 10, 11, 12, 15]),
        (0.0, [0, 3, 12, 15]),
        (1.0, list(range(16))),
    ],
)
def test_the_first_cut_of_the_hand_example(kappa: float, kept: list[int]) -> None:
    assert ordinals(picture(4, 4), edit(Feather(kappa=kappa), picture(4, 4), hand(ROW))) == kept


def test_the_second_cut_of_the_hand_example() -> None:
    method, prompt = Feather(kappa=0.5), picture(4, 4)
    first = edit(method, prompt, hand(ROW))
    assert first is not None
    between = prompt.after(first)
    second = torch.tensor([0.3, 0.1, 0.2, 0.9, 0.8, 0.05, 0.7, 0.6, 0.4, 0.5, 0.15])
    change = edit(method, between, hand(second), stage=1)

    assert ordinals(between, change) == [6, 7]
    assert change is not None
    assert between.after(change).positions.tolist() == [[[0, 7, 8, 17]]]


def test_the_second_cut_may_keep_none() -> None:
    assert ordinals(picture(2, 2), edit(Feather(kappa=0.3), picture(2, 2), hand(torch.rand(4)), stage=1)) == []


def test_the_second_share_may_be_given() -> None:
    assert len(ordinals(picture(4, 4), edit(Feather(keep2=0.5), picture(4, 4), hand(ROW), stage=1))) == 8


def test_a_stride_of_one_keeps_everything_and_a_large_one_the_corner() -> None:
    prompt = picture(4, 4)

    assert edit(Feather(kappa=0.0, stride=1), prompt, hand(ROW)) is None
    assert ordinals(prompt, edit(Feather(kappa=0.0, stride=4), prompt, hand(ROW))) == [0]


def test_the_grid_follows_true_rows_and_columns() -> None:
    yx = picture(3, 5).yx

    assert strided(yx, 2)[0].nonzero().flatten().tolist() == [1, 3, 5, 11, 13, 15]  # rows 0 and 2, columns 0, 2, 4


def test_the_published_counts() -> None:
    scores = torch.rand(729, generator=torch.Generator().manual_seed(0))
    prompt = picture(27, 27)
    first = edit(Feather(), prompt, hand(scores))
    assert first is not None
    (survivors,) = prompt.after(first).visual
    second = edit(Feather(), prompt.after(first), hand(torch.rand(survivors)), stage=1)

    assert 218 <= survivors <= 299
    assert second is not None
    assert second.visual == (int(survivors * 0.09),)


@given(prompts(), st.integers(0, 99))
def test_scores_sum_to_one_over_the_image_and_ignore_positions(before: Layout, seed: int) -> None:
    x = torch.randn(*before.shape, 4, generator=torch.Generator().manual_seed(seed))
    query, key = random_query_key(4, seed=seed)(x, before, rope=False)
    scores = image_scores(query, key, before.last, before.rows(*VISUAL))

    assert_close(scores.sum(1), torch.tensor([float(count > 0) for count in before.visual]))
    assert not scores[~before.rows(*VISUAL)].any()


@given(prompts(text_last=True), st.floats(0, 1), st.integers(1, 4), st.integers(0, 99))
def test_text_and_grid_stay_and_counts_are_within_their_bounds(before: Layout, kappa: float, stride: int, seed: int) -> None:
    x = torch.randn(*before.shape, 4, generator=torch.Generator().manual_seed(seed))
    change = edit(Feather(kappa=kappa, stride=stride), before, random_query_key(4, seed=seed), hidden=x)
    after = before if change is None else before.after(change)

    grid = strided(before.yx, stride)
    for b in range(before.shape[0]):
        origins = after.origin[b][after.valid[b]]
        assert origins.diff().gt(0).all()
        must = before.valid[b] & (grid[b] | ~before.rows(*VISUAL)[b])
        assert set(must.nonzero().flatten().tolist()) <= set(origins.tolist())
        best, forced = int(before.visual[b] * kappa), int(grid[b].sum())
        assert max(best, forced) <= after.visual[b] <= best + forced
        assert torch.equal(after.positions[0, b][after.valid[b]], before.positions[0, b][origins])


@given(prompts(), st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(before: Layout, seed: int) -> None:
    x = torch.randn(*before.shape, 4, generator=torch.Generator().manual_seed(seed))
    method, layer = Feather(kappa=0.4), random_query_key(4, seed=seed)
    together = edit(method, before, layer, hidden=x)
    after = before if together is None else before.after(together)

    for b in range(before.shape[0]):
        own = slice(b, b + 1)
        alone = Layout.build(before.rows(*VISUAL)[own], before.valid[own], before.positions[:, own], before.items[own])
        change = edit(method, alone, layer, hidden=x[own])
        one = alone if change is None else alone.after(change)
        assert after.origin[b][after.valid[b]].tolist() == one.origin[one.valid].tolist()


def test_text_alone_is_left_alone() -> None:
    assert edit(Feather(), layout("tttt"), scored(torch.rand(1, 4))) is None


def test_it_scores_in_the_layer_before_each_cut() -> None:
    assert Feather().sites(traits()) == (Site("decoder", 8), Site("decoder", 16))
    assert Feather().reads(traits()) == (
        Hidden(Site("decoder", 7)),
        Function("query_key", 7),
        Hidden(Site("decoder", 15)),
        Function("query_key", 15),
    )


def test_other_depths_have_the_same_shares() -> None:
    assert Feather().fitted(traits(decoder_layers=4)).layers == (1, 2)
    assert Feather().check(traits(decoder_layers=2)) == "layers=(1, 2): must be in 1..1"
    refusal = Feather(layers=(4, 8)).check(traits(recurrent=(3,)))
    assert refusal == "layers=(4, 8): reads the attention of layers [3], which are recurrent; choose others"


def test_parameters_are_refused_by_name() -> None:
    for parameters in ({"kappa": 1.5}, {"stride": 0}, {"keep2": -0.1}, {"layers": (8,)}, {"layers": (16, 8)}):
        (name,) = parameters
        with pytest.raises(FoveateError, match=f"^feather: {name}="):
            Feather(**parameters)  # type: ignore[arg-type]
