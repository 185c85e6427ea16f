"""V2Drop: the card's hand example, schedule and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.roles import VISUAL
from foveate.core.signal import Hidden, Site
from foveate.core.state import State
from foveate.methods import V2Drop
from foveate.methods.in_llm.v2drop import survivors, variation
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits

BEFORE = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [0.0, 0.0]])
AFTER = torch.tensor([[1.0, 1.0], [0.0, 1.5], [5.0, 6.0], [0.0, 2.0]])


def edit(method: V2Drop, prompt: Layout, before: Tensor, after: Tensor, stage: int = 0) -> Edit | None:
    fit = method.fitted(traits())
    assert fit.layers is not None
    layer = fit.layers[stage]
    return fit.edit(Site("decoder", layer), after, prompt, {Hidden(Site("decoder", layer - 1)): before}, State())


def moved(shape: tuple[int, int], seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, 3, generator=generator), torch.randn(*shape, 3, generator=generator)


def test_variation_of_the_hand_example() -> None:
    assert_close(variation(BEFORE[None], AFTER[None]), torch.tensor([[1.0, 0.5, 5.0, 2.0]]))


@pytest.mark.parametrize(("ratio", "kept"), [(0.5, [2, 3]), (0.0, [2]), (0.25, [2]), (1.0, [0, 1, 2, 3])])
def test_the_hand_example(ratio: float, kept: list[int]) -> None:
    prompt = layout("1111t")
    before, after = (torch.nn.functional.pad(rows, (0, 0, 0, 1))[None] for rows in (BEFORE, AFTER))
    change = edit(V2Drop(layers=(1,), ratios=(ratio,)), prompt, before, after)

    assert (prompt if change is None else prompt.after(change)).origin.tolist() == [[*kept, 4]]


def test_the_published_schedule() -> None:
    method = V2Drop().fitted(traits())
    assert method.layers is not None
    counts, alive = [], 576
    for layer in range(32):
        if layer in method.layers:
            alive = survivors(alive, method.ratios[method.layers.index(layer)])
        counts.append(alive)

    assert [counts[layer] for layer in (0, 2, 3, 16, 17, 21, 22, 31)] == [576, 576, 288, 288, 144, 144, 1, 1]
    assert sum(counts) / 32 == 202.8125


def test_positions_stay_and_the_text_around_the_image_too() -> None:
    before, after = torch.zeros(1, 6, 1), torch.tensor([[[9.0], [1.0], [4.0], [3.0], [2.0], [9.0]]])
    prompt = layout("t1111t")
    change = edit(V2Drop(layers=(1,), ratios=(0.5,)), prompt, before, after)
    assert change is not None

    assert prompt.after(change).positions.tolist() == [[[0, 2, 3, 5]]]


def test_every_image_is_ranked_on_its_own() -> None:
    after = torch.tensor([[[1.0], [2.0], [0.0], [9.0], [7.0], [8.0], [6.0], [0.0]]])
    prompt = layout("11t2222t")
    change = edit(V2Drop(layers=(1,), ratios=(0.5,)), prompt, torch.zeros_like(after), after)
    assert change is not None

    assert prompt.after(change).origin.tolist() == [[1, 2, 3, 5, 7]]


def test_the_whole_ratio_is_no_edit_at_any_stage() -> None:
    method = V2Drop(**V2Drop.identity_at)

    for stage in range(3):
        assert edit(method, layout("t1111t"), *moved((1, 6), 0), stage=stage) is None


def test_text_alone_is_left_alone() -> None:
    assert edit(V2Drop(), layout("tttt"), *moved((1, 4), 0), stage=2) is None


@given(prompts(), st.floats(0, 1), st.floats(0.01, 100), st.integers(0, 99))
def test_scale_and_a_common_shift_change_nothing(before: Layout, ratio: float, scale: float, seed: int) -> None:
    old, new = moved(before.shape, seed)
    method = V2Drop(layers=(1,), ratios=(ratio,))
    plain, scaled = edit(method, before, old, new), edit(method, before, old * scale, new * scale)
    shifted = variation(old + 1, new + 1)

    assert_close(shifted, variation(old, new))
    if plain is None or scaled is None:
        assert plain is scaled
    else:
        assert torch.equal(plain.reduction.anchor, scaled.reduction.anchor)


@given(prompts(text_last=True), st.floats(0, 1), st.integers(0, 99))
def test_each_image_keeps_its_share_and_at_least_one(before: Layout, ratio: float, seed: int) -> None:
    old, new = moved(before.shape, seed)
    change = edit(V2Drop(layers=(1,), ratios=(ratio,)), before, old, new)
    after = before if change is None else before.after(change)

    assert after.alive == [[max(1, int(item.count * ratio)) for item in items] for items in before.items]
    assert after.live == tuple(n - v + k for n, v, k in zip(before.live, before.visual, after.visual))
    # no dropped token of an image moved more than one that stayed
    score = variation(old, new)
    for b, items in enumerate(before.items):
        for j in range(len(items)):
            mine = before.rows(*VISUAL, item=j)[b]
            stays = torch.zeros_like(mine)
            stays[after.origin[b][after.rows(*VISUAL, item=j)[b]]] = True
            if (mine & ~stays).any():
                assert score[b][mine & ~stays].max() <= score[b][stays].min()


@given(prompts(), st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(before: Layout, seed: int) -> None:
    old, new = moved(before.shape, seed)
    method = V2Drop(layers=(1,), ratios=(0.4,))
    together = edit(method, before, old, new)
    after = before if together is None else before.after(together)

    for b in range(before.shape[0]):
        own = slice(b, b + 1)
        alone = Layout.build(before.rows(*VISUAL)[own], before.valid[own], before.positions[:, own], before.items[own])
        change = edit(method, alone, old[own], new[own])
        one = alone if change is None else alone.after(change)
        assert after.origin[b][after.valid[b]].tolist() == one.origin[one.valid].tolist()


def test_it_reads_hidden_states_and_no_attention() -> None:
    assert V2Drop().sites(traits()) == tuple(Site("decoder", layer) for layer in (3, 17, 22))
    assert V2Drop().reads(traits()) == tuple(Hidden(Site("decoder", layer)) for layer in (2, 16, 21))


def test_other_depths_have_the_same_shares() -> None:
    assert V2Drop().fitted(traits(decoder_layers=4)).layers == (1, 2, 3)
    assert V2Drop().fitted(traits(decoder_layers=8)).layers == (1, 4, 6)
    assert V2Drop().check(traits(decoder_layers=3)) == "layers=(1, 2, 3): must be in 1..2"
    assert V2Drop().check(traits()) is None


def test_parameters_are_refused_by_name() -> None:
    with pytest.raises(FoveateError, match=r"v2drop: ratios=\(0.5,\): must be one for each of the 3 stages"):
        V2Drop(ratios=(0.5,))
    with pytest.raises(FoveateError, match=r"v2drop: ratios=\(2.0,\): must be shares"):
        V2Drop(layers=(1,), ratios=(2.0,))
    with pytest.raises(FoveateError, match=r"v2drop: layers=\(3, 2\): must be ascending"):
        V2Drop(layers=(3, 2), ratios=(0.5, 0.5))
