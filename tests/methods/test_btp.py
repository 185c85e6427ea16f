"""BTP: the card's worked examples, and its counts."""

from __future__ import annotations

import pytest
import torch

from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Attention, Rows, Seen, Site
from foveate.core.state import State
from foveate.methods import BTP
from foveate.methods.in_llm.btp import PRESETS, balanced, spread_cells
from foveate.ops.farthest import farthest_first
from tests.methods.bodiless import layout, traits


def run(method: BTP, prompt: Layout, seed: int = 0, samples: slice = slice(None)) -> list[Layout]:
    """The layout behind each stage, on random tokens."""
    generator, found = torch.Generator().manual_seed(seed), []
    for layer in method.layers or ():
        x = torch.randn(2, prompt.shape[1], 6, generator=generator)[samples]
        logits = torch.randn(2, 2, 1, prompt.shape[1], generator=generator)[samples]
        seen: Seen = {Rows(Site("decoder", layer - 1)): Attention(logits, logits.logsumexp(-1))}
        edit = method.edit(Site("decoder", layer), x, prompt, seen, State())
        prompt = prompt if edit is None else prompt.after(edit)
        found.append(prompt)
    return found


def of(rows: int, columns: int, before: int = 0, after: int = 2) -> Layout:
    """A prompt with one picture."""
    visual = torch.tensor([[False] * before + [True] * (rows * columns) + [False] * after])
    items = [[Item(rows, columns, 0)]]
    return Layout.build(visual, torch.ones_like(visual), torch.arange(visual.shape[1])[None, None], items)


def test_the_spatial_set_of_the_worked_examples() -> None:
    assert spread_cells(4, 4, 6) == (0, 15, 3, 9, 6, 12)
    assert spread_cells(3, 3, 5) == (0, 8, 2, 4, 6)


def test_the_diverse_ones_of_the_worked_examples() -> None:
    x = torch.tensor([[[1, 0], [0.9, 0.1], [0, 1], [-1, 0], [0.7, 0.7]]])
    taken = torch.tensor([[True, False, False, False, False]])

    assert farthest_first(x, 3).tolist() == [[3, 0, 2]]
    assert farthest_first(x, 2, taken=taken).tolist() == [[3, 2]]


@pytest.mark.parametrize(("among", "front", "chosen"), [(6, 4, [2, 3, 4, 5]), (6, 0, [4, 5, 6, 7]), (6, 8, [4, 5, 6, 7])])
def test_the_attended_ones_of_the_worked_example(among: int, front: int, chosen: list[int]) -> None:
    z = torch.tensor([[0.2, 0.1, 0.55, 0.3, 0.9, 0.8, 0.7, 0.6]])
    order = balanced(z, torch.tensor([among]), torch.tensor([front]))

    assert sorted(order[0, :4].tolist()) == chosen


def test_counts_of_llava() -> None:
    method = BTP().fitted(traits())
    behind = run(method, of(24, 24, before=35))

    assert method.layers == (3, 6, 14, 22)
    assert [one.visual for one in behind] == [(288,), (144,), (48,), (0,)]
    assert [PRESETS["llava"].mixes[0].counts(288), PRESETS["llava"].mixes[1].counts(144)] == [(86, 86, 318), (14, 129, 193)]
    for one in behind:
        assert one.positions[0, 0].tolist() == one.origin[0].tolist() == sorted(set(one.origin[0].tolist()))


def test_the_spatial_set_survives_the_first_stage() -> None:
    (first,) = run(BTP(layers=(3,), ratios=(0.5,)), of(8, 6))

    assert set(spread_cells(8, 6, 12)) <= set(first.ordinals()[0][0].tolist())


def test_each_grid_has_a_spatial_set() -> None:
    (first,) = run(BTP(layers=(3,), ratios=(0.5,)), layout("t" + "1" * 12 + "2" * 12 + "t"))

    for ordinals in first.ordinals()[0]:
        assert set(spread_cells(1, 12, 3)) <= set(ordinals.tolist())


@pytest.mark.parametrize("preset", ["llava", "qwen"])
def test_a_sample_gets_in_a_batch_what_it_gets_alone(preset: str) -> None:
    method = BTP(layers=(1, 2), ratios=(0.5, 0.5), preset=preset)  # type: ignore[arg-type]
    first, second = "...t" + "1" * 24 + "tt", "t" + "1" * 15 + "2" * 12 + "tt"
    both = run(method, layout(first, second))[0]

    for sample, prompt in enumerate((first, second)):
        alone = run(method, layout(prompt), samples=slice(sample, sample + 1))[0]
        assert [one.tolist() for one in both.ordinals()[sample]] == [one.tolist() for one in alone.ordinals()[0]]


def test_tokens_that_the_last_row_does_not_see_go_before_padding() -> None:
    method = BTP(layers=(1,), ratios=(0.6,))
    prompts = "." * 12 + "t" + "1" * 8 + "t" * 4, "t" + "1" * 20 + "t" * 4

    def kept(*some: str) -> list[int]:
        prompt = layout(*some)
        x = torch.randn(1, 25, 6, generator=torch.Generator().manual_seed(0)).expand(*prompt.shape, -1)
        unseen = torch.full((len(some), 2, 1, 25), float("-inf"))
        seen: Seen = {Rows(Site("decoder", 0)): Attention(unseen, torch.zeros(len(some), 2, 1))}
        edit = method.edit(Site("decoder", 1), x, prompt, seen, State())
        assert edit is not None
        return [row for row in edit.reduction.anchor[0].tolist() if row >= 0]

    assert len(kept(prompts[0])) == 5 + 4
    assert kept(*prompts) == kept(prompts[0])


def test_it_says_what_does_not_fit() -> None:
    assert "one for each of layers=(3, 6, 14, 22)" in str(BTP(ratios=(0.5,)).check(traits()))
    assert "must be in 1..31" in str(BTP(layers=(32,), ratios=(0.5,)).check(traits()))
