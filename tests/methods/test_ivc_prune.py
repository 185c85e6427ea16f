"""IVC-Prune: the card's checks of the anchors, and the invariants of both modes."""

from __future__ import annotations

import functools
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
from foveate.core.signal import Function, KeyValue, Site
from foveate.core.state import State
from foveate.methods import IVCPrune
from foveate.methods.in_llm.ivc_prune import Mode, anchors, fill, foreground, rotary_means
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits
from tests.methods.llama import rotate

MODES: tuple[Mode, ...] = ("fixed", "union")


def values_of(prompt: Layout, seed: int = 0) -> Tensor:
    return torch.randn(prompt.shape[0], 2, prompt.shape[1], 8, generator=torch.Generator().manual_seed(seed))


def edit(method: IVCPrune, prompt: Layout, values: Tensor | None = None) -> Edit | None:
    values = values_of(prompt) if values is None else values
    seen: dict[Any, Any] = {KeyValue(Site("decoder", 15)): (values.clone().zero_(), values), Function("rotate", 16): rotate}
    fit = method.fitted(traits(rotary_rows=len(prompt.positions)))
    return fit.edit(Site("decoder", 16), torch.zeros(*prompt.shape, 1), prompt, seen, State())


def pruned(method: IVCPrune, prompt: Layout, values: Tensor | None = None) -> Layout:
    change = edit(method, prompt, values)
    return prompt if change is None else prompt.after(change)


def image(rows: int, columns: int, before: int = 4, after: int = 6, mrope: bool = False) -> Layout:
    """An image between text rows, with positions as Qwen numbers them if ``mrope``."""
    count = rows * columns
    place = torch.arange(before + count + after)
    visual = ((place >= before) & (place < before + count))[None]
    positions = place.expand(3 if mrope else 1, -1).clone()
    if mrope:
        cell = torch.arange(count)
        positions[:, before : before + count] = before + torch.stack([cell * 0, cell // columns, cell % columns])
        positions[:, before + count :] += max(rows, columns) - count
    return Layout.build(visual, torch.ones_like(visual), positions[:, None], [[Item(rows, columns, 0)]])


def test_means_of_the_hand_example() -> None:
    positions = torch.arange(16)[None, None]
    cos, sin = rotary_means(functools.partial(rotate, base=100.0), positions, 4)

    assert_close(
        cos[0, :8].float(),
        torch.tensor([1, 0.7677, 0.2820, -0.0173, 0.1337, 0.5806, 0.8928, 0.7594]),
        atol=5e-5,
        rtol=0,
    )
    assert cos[0].sort(descending=True).indices[:2].tolist() == [0, 6]
    assert sin[0].sort(descending=True).indices[:2].tolist() == [14, 8]
    assert_close(sin[0, [14, 8]].float(), torch.tensor([0.9880, 0.8534]), atol=5e-5, rtol=0)


def test_the_cosines_of_llava_choose_the_start_of_the_image() -> None:
    cos, _ = rotary_means(rotate, torch.arange(5, 581)[None, None], 128)

    assert anchors(cos, cos, 29)[0].nonzero().flatten().tolist() == [*range(28), 32]


def test_mirrored_cells_tie_and_the_lower_index_wins() -> None:
    prompt = image(24, 24, mrope=True)
    mine = prompt.ordinal[0] >= 0
    means = rotary_means(functools.partial(rotate, base=1e6), prompt.positions, 128)
    for mean in means:
        grid = mean[0, mine].reshape(24, 24)
        assert torch.equal(grid, grid.T)
    split = 0
    for k in range(1, 577):
        chosen = anchors(means[0][:, mine], means[0][:, mine], k)[0].reshape(24, 24)
        # Of a pair that the cut splits, the cell above the diagonal stays.
        assert not (chosen & ~chosen.T).tril(-1).any()
        split += int((chosen != chosen.T).any())
    assert split > 100


def test_the_means_are_over_the_rows_of_the_positions() -> None:
    positions = torch.randint(0, 50, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    together = rotary_means(rotate, positions, 8)
    alone = [rotary_means(rotate, row[None], 8) for row in positions]

    for part in (0, 1):
        assert_close(together[part], torch.stack([one[part] for one in alone]).mean(0), atol=1e-8, rtol=0)


def test_a_fourth_row_in_front_is_no_coordinate() -> None:
    positions = torch.randint(0, 50, (3, 2, 5), generator=torch.Generator().manual_seed(0))
    longer = torch.cat([torch.arange(5).expand(1, 2, -1), positions])

    assert torch.equal(rotary_means(rotate, longer, 8)[0], rotary_means(rotate, positions, 8)[0])


def test_scores_are_means_over_question_and_seeds() -> None:
    prompt, values = layout("t1111ttt"), values_of(layout("t1111ttt"))
    keys, rows = prompt.ordinal >= 0, torch.tensor([[1, 2, 3, 4]])
    asked, seeds, like = foreground(values, keys, rows, torch.tensor([[-1, 6, 7]]), 2)

    map_ = (values @ values.transpose(2, 3) * 8**-0.5).masked_fill(~keys[:, None, None], float("-inf")).softmax(-1)
    similarity = map_.mean(1)[0]
    assert_close(asked[0], similarity[[6, 7], 1:5].mean(0))
    assert seeds[0].tolist() == asked[0].sort(descending=True, stable=True).indices[:2].tolist()
    assert_close(like[0], similarity[[6, 7, *(seeds[0] + 1).tolist()], 1:5].mean(0))


@pytest.mark.parametrize(
    ("mode", "k", "kept"),
    [("fixed", 3, [0, 3, 4]), ("fixed", 1, [0, 4]), ("union", 3, [0, 1, 2, 3, 4]), ("union", 0, [0, 4])],
)
def test_a_set_is_filled_or_added_to(mode: Mode, k: int, kept: list[int]) -> None:
    scores, first = torch.tensor([[0.0, 2.0, 1.0, 3.0, 0.5]]), torch.tensor([[True, False, False, False, True]])

    assert fill(scores, first, k, mode)[0].nonzero().flatten().tolist() == kept


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_fixed_keeps_half_of_each_image(rows: int, columns: int, seed: int) -> None:
    prompt = image(rows, columns, mrope=True)
    change = edit(IVCPrune(), prompt, values_of(prompt, seed))
    after = prompt if change is None else prompt.after(change)

    count = rows * columns
    assert after.visual == (max(round(count / 2), 1),)
    assert change is None or change.all_layers
    assert torch.equal(after.positions, prompt.positions[:, :, after.origin[0]])


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_union_keeps_no_more_than_its_parts(rows: int, columns: int, seed: int) -> None:
    prompt = image(rows, columns)
    after = pruned(IVCPrune(), prompt, values_of(prompt, seed))

    count = rows * columns
    anchor, seeds, context = round(0.05 * count), max(1, round(0.01 * count)), round(0.2 * count)
    assert max(anchor, seeds, context) <= after.visual[0] <= 2 * anchor + seeds + context
    assert after.visual == tuple(after.rows(*VISUAL).sum(1).tolist())


def test_anchors_stay_whatever_the_image_shows() -> None:
    prompt = image(8, 8)
    means = [mean[:, prompt.ordinal[0] >= 0] for mean in rotary_means(rotate, prompt.positions, 8)]
    expected = set(anchors(means[0], means[1], round(0.05 * 64))[0].nonzero().flatten().tolist())

    for seed in range(5):
        after = pruned(IVCPrune(), prompt, values_of(prompt, seed))
        assert expected <= set(after.ordinal[0].tolist())


@pytest.mark.parametrize("mode", MODES)
def test_a_single_token_stays(mode: Mode) -> None:
    assert pruned(IVCPrune(mode=mode), image(1, 1)).visual == (1,)


@pytest.mark.parametrize("mode", MODES)
def test_constant_values_leave_it_to_anchors_and_index(mode: Mode) -> None:
    prompt = image(4, 4)
    after = pruned(IVCPrune(mode=mode, anchor=0.1, context=0.1), prompt, torch.ones(1, 2, prompt.shape[1], 8))

    cos, sin = (mean[:, prompt.ordinal[0] >= 0] for mean in rotary_means(rotate, prompt.positions, 8))
    first = anchors(cos, sin, 2)[0] | (torch.arange(16) == 0)  # the seed
    more = [i for i in range(16) if not first[i]][: 8 - int(first.sum())] if mode == "fixed" else [0, 1]
    expected = sorted({*first.nonzero().flatten().tolist(), *more})
    assert after.ordinal[after.ordinal >= 0].tolist() == expected


@pytest.mark.parametrize("mode", MODES)
@given(before=prompts(), seed=st.integers(0, 99))
def test_everything_is_kept_at_the_identity(mode: Mode, before: Layout, seed: int) -> None:
    assert edit(IVCPrune(mode=mode, **IVCPrune.identity_at), before, values_of(before, seed)) is None


@pytest.mark.parametrize("mode", MODES)
@given(before=prompts(), seed=st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(mode: Mode, before: Layout, seed: int) -> None:
    method, values = IVCPrune(mode=mode, context=0.4, anchor=0.2), values_of(before, seed)
    after = pruned(method, before, values)

    assert after.live == tuple(after.valid.sum(1).tolist())
    assert after.visual == tuple(after.rows(*VISUAL).sum(1).tolist())
    for b in range(before.shape[0]):
        own = slice(b, b + 1)
        alone = Layout.build(before.rows(*VISUAL)[own], before.valid[own], before.positions[:, own], before.items[own])
        one = pruned(method, alone, values[own])
        assert after.origin[b][after.valid[b]].tolist() == one.origin[one.valid].tolist()


@given(prompts(), st.integers(0, 99))
def test_every_image_keeps_its_own_half(before: Layout, seed: int) -> None:
    after = pruned(IVCPrune(mode="fixed"), before, values_of(before, seed))

    assert after.alive == [[max(1, round(item.count / 2)) for item in items] for items in before.items]


def test_rows_behind_the_image_are_skipped_unless_they_are_all() -> None:
    values = values_of(layout("t11111111ttt"))
    values[:, :, -1] = values[:, :, 5] * 9  # the last row asks for the fifth token
    method = IVCPrune(mode="union", context=0.0, anchor=0.0)

    assert pruned(method, layout("t11111111ttt"), values).ordinal[0].tolist() == [-1, 4, -1, -1, -1]
    short = torch.cat([values[:, :, :9], values[:, :, -1:]], dim=2)
    assert pruned(method, layout("t11111111t"), short).ordinal[0].tolist() == [-1, 4, -1]


def test_text_alone_is_left_alone() -> None:
    assert edit(IVCPrune(), layout("tttt")) is None


def test_it_reads_values_of_the_layer_before() -> None:
    assert IVCPrune().sites(traits()) == (Site("decoder", 16),)
    assert IVCPrune().reads(traits()) == (KeyValue(Site("decoder", 15)), Function("rotate", 16))


def test_depth_and_mode_are_those_of_the_family() -> None:
    qwen, tiny = traits(decoder_layers=28, rotary_rows=3), traits(decoder_layers=4)

    assert IVCPrune().fitted(qwen) == IVCPrune(layer=16, mode="fixed")
    assert IVCPrune().fitted(tiny) == IVCPrune(layer=2, mode="union")
    assert IVCPrune(mode="union", layer=3).fitted(qwen) == IVCPrune(mode="union", layer=3)
    assert IVCPrune(layer=32).check(traits()) == "layer=32: must be in 1..31"
    assert IVCPrune().check(traits()) is None


def test_parameters_are_refused_by_name() -> None:
    for parameters in ({"layer": 0}, {"mode": "both"}, {"target": 1.5}, {"context": -1}, {"anchor": 2}, {"skip": 0.5}):
        (name,) = parameters
        with pytest.raises(FoveateError, match=f"^ivc_prune: {name}="):
            IVCPrune(**parameters)  # type: ignore[arg-type]
