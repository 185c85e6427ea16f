"""LS-ViT: its fits by hand, searches against brute force, and what learning a block may and may not do."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.testing import assert_close

from foveate.core.weights import Weights
from foveate.engine.replay import Replay
from foveate.engine.slopes import Slopes
from foveate.engine.trial import Trial
from foveate.methods import LSViT
from foveate.methods.weights.ls_vit import Curvature, Pairs, balanced, pieces
from foveate.models import anatomy
from foveate.ops.grid import Grid
from foveate.ops.rounding import exponent_at, hardened, indecision, levelled, mixed, shares, softened, undecided_at
from foveate.ops.solve import Moments
from foveate.ops.steps import by_input, by_output, for_inputs, for_weight, nearest
from tests.suite.bodies import BODIES, RAGGED


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fitted(off: Tensor, slope: Tensor) -> Curvature:
    pairs = Pairs(off.shape[1])
    pairs.add(off, slope)
    return pairs.fitted


def test_the_cards_diagonal() -> None:
    assert_close(fitted(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [8.0]])).diagonal, torch.tensor([3.4]))


def test_the_cards_direction() -> None:
    off, slope = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    found = fitted(off, slope)
    assert_close(found.direction, torch.tensor([1.0, 2.0]))
    assert_close(found(torch.tensor([[1.0, -1.0]]))[1], torch.tensor(0.5))

    against = torch.cat([off, off[:1]]), torch.cat([slope, torch.tensor([[-1.0, 0.0]])])
    assert_close(fitted(*against).direction, torch.tensor([1.0, 2.0]))
    assert_close(fitted(*against).diagonal, torch.tensor([0.0, 4.0]))


def test_fits_give_back_the_curvature_that_slopes_are_of() -> None:
    off, diagonal, direction = random(5, 7), random(7, seed=1).abs(), random(7, seed=2)
    assert_close(fitted(off, off * diagonal).diagonal, diagonal)
    same = off * (off @ direction).sign()[:, None]  # of one side: the paper's root does not know of the other
    slope = (same @ direction)[:, None] * direction
    assert_close(fitted(same, slope).direction, direction, rtol=1e-4, atol=1e-5)
    assert_close(fitted(-same, -slope).direction, -direction, rtol=1e-4, atol=1e-5)

    slope = random(5, 7, seed=3)
    once = fitted(off, slope)
    for other in (
        fitted(off.repeat(3, 1), slope.repeat(3, 1)),
        fitted(4 * off, 4 * slope),
        fitted(off.flip(0), slope.flip(0)),
    ):
        assert_close(other.diagonal, once.diagonal)
        assert_close(other.direction, once.direction)
    assert_close(fitted(off[:1], slope[:1]).diagonal, (slope[0] / off[0]).clamp(min=0))
    equal = torch.full_like(off, 0.5)
    assert_close(fitted(equal, slope).diagonal, (slope.mean(0) / 0.5).clamp(min=0))
    assert not fitted(torch.zeros_like(off), slope).diagonal.any()


def test_curvature_of_one_everywhere_is_half_the_squared_error() -> None:
    off = random(4, 6)
    terms = Curvature(torch.ones(6), torch.zeros(6))(off)
    assert_close(terms, torch.stack([off.square().sum(1).mean() / 2, torch.zeros(())]))
    assert_close(balanced(terms / 4, terms, apart=False), torch.tensor(0.25))
    both = torch.tensor([1.0, 3.0])
    assert_close(balanced(both, torch.tensor([2.0, 2.0]), apart=False), torch.tensor(1.0))
    assert_close(balanced(both, torch.tensor([2.0, 2.0]), apart=True), torch.tensor(2.0))


def test_rows_make_pairs_where_nobody_says_whose_they_are() -> None:
    x = random(2, 3, 4)
    assert pieces(x, alike=True).shape == (2, 12)
    assert torch.equal(pieces(x, alike=False), pieces(x.flatten(0, 1), alike=False))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_roundings_start_at_the_weights_and_end_on_the_grid(symmetric: bool, groups: int) -> None:
    weight = random(6, 8)
    grid = Grid.of(weight, 4, 8 // groups, symmetric)
    alpha = undecided_at(weight, grid)
    numbers, (least, most) = grid.numbers(weight), grid.limits
    within = (numbers > least) & (numbers < most)
    start = softened(weight, grid, shares(alpha))
    assert_close(start[within], weight[within], atol=1e-5, rtol=1e-5)
    assert ((start - weight).abs() <= grid.scale.amax() / 2 + 1e-5).all()
    firm = hardened(weight, grid, alpha)
    assert firm.dtype == (torch.int8 if symmetric else torch.uint8)
    assert (grid.values(firm) - grid.rounded(weight)).abs().gt(1e-6).float().mean() < 0.03  # halves go up
    assert_close(softened(weight, grid, (alpha >= 0).float()), grid.values(firm))


def test_the_penalty_is_for_the_undecided() -> None:
    assert indecision(torch.tensor([0.0, 1.0, 1.0]), 2.0) == 0
    assert indecision(torch.full((3,), 0.5), 20.0) == 3
    assert [exponent_at(step, 100) for step in (1, 19, 20, 60, 100)] == [None, None, 20.0, 11.0, 2.0]


def test_levels_pass_gradients_straight_through_to_inputs_and_their_step() -> None:
    x, scale = torch.tensor([-9.0, -0.4, 0.3, 9.0], requires_grad=True), torch.tensor(0.5, requires_grad=True)
    made = levelled(x, scale, torch.tensor(3.0), 3)
    assert_close(made, torch.tensor([-1.5, -0.5, 0.5, 2.0]))
    made.sum().backward()
    assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))
    # Below and above: how many steps the end is away from 0; within: how far rounding went.
    assert_close(scale.grad, torch.tensor(-3.0 + 4.0 + (-1 + 0.8) + (1 - 0.6)))


def test_chance_mixes_by_its_share() -> None:
    torch.manual_seed(0)
    zeros, ones = torch.zeros(100, 100), torch.ones(100, 100)
    assert abs(float(mixed(zeros, ones, 0.25).mean()) - 0.75) < 0.02
    assert torch.equal(mixed(zeros, ones, 1.0), zeros)


@pytest.mark.parametrize("symmetric", [False, True])
def test_searches_find_what_trying_all_finds(symmetric: bool) -> None:
    weight, x = random(3, 8), random(40, 8, seed=1) * 2
    fed = Grid(3, torch.tensor([[0.6]]), torch.tensor([[4.0]]))
    rounded = fed.rounded(x)
    offered = for_weight(weight, 3, 1, 64, symmetric)
    grids = [offered[number] for number in range(len(offered))]
    assert len(grids) == 64
    moments = Moments(8, paired=True)
    moments.add(rounded[:15], x[:15])
    moments.add(rounded[15:], x[15:])

    own = torch.stack([(grid.rounded(weight) - weight).square().sum(1) for grid in grids]).argmin(0)
    made = torch.stack(
        [(functional.linear(rounded, grid.rounded(weight)) - functional.linear(x, weight)).square().sum(0) for grid in grids]
    ).argmin(0)
    for found, best in ((nearest(offered, weight), own), (by_output(offered, weight, moments), made)):
        assert_close(found.scale[:, 0], torch.stack([grids[number].scale[row, 0] for row, number in enumerate(best)]))
        assert found.symmetric == symmetric
    low, high = x.aminmax()
    steps = for_inputs(x, low, high, 3, 64)
    stand = nearest(offered, weight).rounded(weight)
    errors = [
        (functional.linear(steps[n].rounded(x), stand) - functional.linear(x, weight)).square().sum() for n in range(64)
    ]
    best_of = steps[int(torch.stack(errors).argmin())]
    found = by_input(steps, x, [weight[:1], weight[1:]], [stand[:1], stand[1:]])
    assert_close((found.scale, found.zero), (best_of.scale, best_of.zero))


def test_rows_of_zeros_and_constant_rows_have_a_grid() -> None:
    weight = torch.stack([torch.zeros(8), torch.ones(8), random(8)])
    for stored in (None, torch.bfloat16, torch.float16):
        grid = nearest(for_weight(weight, 4, 1, 128, symmetric=False, stored=stored), weight)
        assert grid.scale.isfinite().all()
        assert grid.scale.min() > 0
        assert not grid.rounded(weight)[0].any()
        assert stored is None or torch.equal(grid.scale.to(stored).float(), grid.scale)


def _trial(name: str, number: int = 0) -> Trial:
    body = BODIES[name]
    batches = [body.inputs(RAGGED), body.inputs(RAGGED, seed=1)]
    replay = Replay(anatomy(body.model()), batches, "encoder")
    states: Any = {stream: [watched.x for watched in replay.batches] for stream in ("exact", "reached")}
    return Trial(replay, number, states, Slopes(replay, batches), print)


METHOD = LSViT(bits=3, activations=4, candidates=32, rounds=1, steps=60, rate=0.02, drop=0.0)


def test_learning_makes_the_block_nearer_by_its_own_measure() -> None:
    block = _trial("llava-clip")
    found = METHOD.searched(block)
    integers = {name: found.grids[name].integers(weight) for name, weight in found.weights.items()}
    curvature = METHOD.curved(block, found.on_grids(integers))
    assert curvature is not None
    before = METHOD.loss(block, curvature, found.on_grids(integers))
    torch.manual_seed(0)
    learned, firm = LSViT(**{**METHOD.bound(), "decision": 0.0}).learned(block, found, curvature)
    soft_of = METHOD.loss(block, curvature, learned.on_grids(firm))
    assert soft_of < 0.8 * before
    assert all(not torch.equal(firm[name], integers[name]) for name in firm)
    for name, numbers in firm.items():
        assert (numbers.int() - integers[name].int()).abs().max() <= 1  # never beyond the neighbour
    assert not torch.equal(learned.inputs["mlp.fc1"].scale, found.inputs["mlp.fc1"].scale)
    assert learned.inputs["self_attn.q_proj"] is not found.inputs["self_attn.q_proj"]
    assert len({float(learned.inputs[f"self_attn.{name}_proj"].scale) for name in "qkv"}) == 1


def test_what_was_learned_in_too_few_steps_is_not_taken(capsys: pytest.CaptureFixture[str]) -> None:
    worse = LSViT(bits=3, candidates=16, rounds=0, steps=3, rate=1.0, decision=100.0)
    plain = LSViT(bits=3, candidates=16, rounds=0, steps=0)
    placed = []
    for method in (worse, plain, LSViT(**{**worse.bound(), "nearest": False})):
        block = _trial("llava-clip")
        torch.manual_seed(0)
        method.quantize(block)
        placed.append(block.placed)
    assert "block 0: is rounded to nearest, as what was learned in steps=3 is worse" in capsys.readouterr().out
    for name, replaced in placed[0].items():
        assert torch.equal(replaced.integers, placed[1][name].integers)
        assert replaced.inputs is None
    assert any(not torch.equal(placed[2][name].integers, placed[1][name].integers) for name in placed[1])


@pytest.mark.parametrize("name", ["llava-clip", "qwen2_5_vl"])
def test_a_block_that_nothing_depends_on_is_said(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    block = _trial(name, number=3)
    LSViT(bits=4, candidates=16, rounds=0, steps=1).quantize(block)
    unread = name == "llava-clip"  # its features are those of the last block but one
    assert ("block 3: is rounded to nearest, as no answer depends on it" in capsys.readouterr().out) == unread
    assert set(block.placed) == set(block.linears)


def test_what_is_fitted_can_be_chosen() -> None:
    block = _trial("llava-clip")
    found = METHOD.searched(block)
    stands = found.on_grids({name: found.grids[name].integers(weight) for name, weight in found.weights.items()})
    both, diagonal, direction, none = (
        LSViT(**{**METHOD.bound(), "curvature": choice}).curved(block, stands)
        for choice in ("both", "diagonal", "direction", "none")
    )
    assert both
    assert diagonal
    assert direction
    assert none
    assert torch.equal(diagonal.diagonal, both.diagonal)
    assert not diagonal.direction.any()
    assert torch.equal(direction.direction, both.direction)
    assert not direction.diagonal.any()
    assert bool((none.diagonal == 1).all())
    assert both.diagonal.min() >= 0


def test_a_seed_fixes_all() -> None:
    found = []
    for _ in range(2):
        block = _trial("llava-clip")
        torch.manual_seed(7)
        LSViT(**{**METHOD.bound(), "steps": 5, "drop": 0.5, "nearest": False, "rate": 1.0, "rounds": 0}).quantize(block)
        found.append(block.placed)
    for number, name in zip(count(), found[0]):
        assert torch.equal(found[0][name].integers, found[1][name].integers), number
        one, other = (each[name].inputs for each in found)
        assert one is not None
        assert other is not None
        assert torch.equal(one.scale, other.scale)


def test_it_replaces_weights_of_the_encoder() -> None:
    assert issubclass(LSViT, Weights)
    assert LSViT.part == "encoder"
