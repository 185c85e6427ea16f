"""GPTQ, GPTAQ and VLM-PTQ on a block: what each adds, and when that is nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.weights import Weights
from foveate.engine.trial import Trial
from foveate.methods import GPTAQ, GPTQ, RTN, VLMPTQ
from foveate.methods.weights.vlm_ptq import MUS, importance, mixed
from foveate.ops.solve import Moments, loss
from tests.blocks import GROUPS, NAMES, drawn, trial


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def placed(method: Weights, case: dict[str, Any] | None = None) -> Trial:
    block = trial(case or drawn())
    method.quantize(block)
    return block


def same(one: Trial, other: Trial) -> bool:
    return all(torch.equal(one.placed[name].integers, other.placed[name].integers) for name in NAMES.values())


def steady(case: dict[str, Any]) -> dict[str, Any]:
    """What reaches the block is what the unquantized model feeds it."""
    return {**case, "x_q": case["x"]}


def test_the_cards_importance() -> None:
    x, visual = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, -1.0]]), torch.tensor([True, False, False])
    sums = importance(x, visual)

    assert sums.tolist() == [[4.0, 0.0], [1.0, 2.0]]
    assert mixed(sums, 0.5).tolist() == [2.5, 1.0]
    assert_close(mixed(importance(x, ~visual), 0.3), mixed(sums, 0.7))


def test_without_its_term_gptaq_is_gptq_and_without_shift_and_importance_vlm_ptq_is_gptaq() -> None:
    assert same(placed(GPTAQ(alpha=0)), placed(GPTQ()))
    assert not same(placed(GPTAQ()), placed(GPTQ()))
    unclipped = placed(VLMPTQ(bits=4, correction=0, clip=False))
    assert same(unclipped, placed(GPTAQ(clip=False)))
    assert not same(unclipped, placed(VLMPTQ(bits=4, clip=False)))


def test_where_streams_agree_the_first_linears_are_gptqs() -> None:
    """Later ones differ: what was placed before them moves their inputs."""
    case = steady(drawn())
    one, other = placed(VLMPTQ(bits=4, clip=False), case), placed(GPTQ(clip=False), case)

    assert all(torch.equal(one.placed[name].integers, other.placed[name].integers) for name in GROUPS["attn"])


def test_mu_of_one_asks_visual_rows_only() -> None:
    x, visual = random(20, 8), torch.arange(20) < 8
    other = torch.where(visual[:, None], x, random(20, 8, seed=1))

    assert torch.equal(mixed(importance(x, visual), 1.0), mixed(importance(other, visual), 1.0))
    assert not torch.equal(mixed(importance(x, visual), 0.8), mixed(importance(other, visual), 0.8))


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("group", [-1, 8])
def test_the_searched_mu_is_the_best_of_all(bits: Any, group: Any) -> None:
    x = random(60, 16) @ random(16, 16, seed=1)
    moments = Moments(16, paired=True)
    moments.add(x, x + 0.2 * random(60, 16, seed=2))
    sums, weight = importance(x, torch.arange(60) < 40), random(12, 16, seed=3).float()
    method = VLMPTQ(bits=bits, group_size=group)
    factored = method.factored(moments)

    def error(method: VLMPTQ) -> float:
        integers, grid = method.best(weight, factored, sums, moments.own, moments.ahead)
        return float(loss(weight, grid.values(integers), moments.own, moments.ahead))

    each = [error(VLMPTQ(bits=bits, group_size=group, mu=mu)) for mu in MUS]
    assert_close(error(method), min(each))
    assert error(VLMPTQ(bits=bits, group_size=group, mu_search="rtn")) in each


@pytest.mark.parametrize("kind", [GPTQ, GPTAQ, VLMPTQ])
def test_outputs_are_nearer_than_by_rounding_on_average(kind: Any) -> None:
    ratios = []
    for seed in range(3):
        case = drawn(seed)
        case["x"] = case["x"].repeat(1, 1, 1)
        solved, rounded = placed(kind(bits=3), case), placed(RTN(bits=3, clip=True), case)
        for names in GROUPS.values():
            (rows,), (exact,) = solved.reached(names[0]), solved.exact(names[0])
            for name in names:
                wanted = exact.x @ solved.weight(name).T
                errors = []
                for block in (solved, rounded):
                    found = block.placed[name]
                    errors.append((rows.x @ found.grid.values(found.integers).float().T - wanted).square().sum())
                ratios.append(float(errors[0] / errors[1]))
    assert sum(ratios) / len(ratios) < 0.9


def test_reordered_columns_and_groups() -> None:
    for method in (GPTQ(ordered=True), GPTQ(ordered=True, group_size=16), VLMPTQ(ordered=True, group_size=16, bits=2)):
        block = placed(method)
        for name in NAMES.values():
            found = block.placed[name]
            groups = 1 if method.group_size == -1 else block.weight(name).shape[1] // 16
            assert found.grid.scale.shape[1] == groups
            assert (found.grid.values(found.integers) - block.weight(name)).abs().mean() < 0.2


def test_more_damping_than_told_is_said() -> None:
    case = drawn()
    case["x"] = case["x_q"] = case["x"][:1, :1].expand(1, 9, 32).contiguous()
    case |= {mask: case[mask][:1] for mask in ("vis_mask", "ans_mask")}
    said: list[str] = []
    block = trial(case)
    block.say = said.append
    GPTQ(damping=0).quantize(block)

    assert said
    assert all("damping=" in line for line in said)


def test_rounded_activations_are_what_it_is_fitted_to() -> None:
    case = steady(drawn())

    assert not same(placed(GPTQ(activations=4), case), placed(GPTQ(), case))
    assert placed(GPTQ(activations=4), case).placed[NAMES["q"]].activations == 4
