"""LS-ViT's surroundings, which are FIMA-Q's: searches for steps, learned rounding, and the halves of the fitted loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.testing import assert_close

from foveate.core.weights import Stream
from foveate.engine.replay import Replay
from foveate.engine.slopes import Slopes
from foveate.engine.trial import Trial
from foveate.methods import LSViT
from foveate.methods.weights.ls_vit import Curvature, Pairs, Rounded, balanced, pieces
from foveate.ops.grid import Grid
from foveate.ops.rounding import exponent_at, shares, undecided_at
from foveate.ops.steps import for_inputs, for_weight, nearest, nearest_inputs
from tests.blocks import OneBlock
from tests.vectors import Case

LINEAR = "0"


def check_own_errors(case: Case) -> None:
    weight, x = case["weight"], case["x"].flatten(0, 1)
    found = nearest(for_weight(weight, case["w_bits"], 1, case["eq_n"], symmetric=False), weight)
    low, high = x.aminmax()
    fed = nearest_inputs(for_inputs(x, low, high, case["a_bits"], case["eq_n"]), x)

    assert_close(found.scale[:, 0], case["out_self_w_scale"])
    assert_close(found.zero, case["out_self_w_zero"][:, None])
    assert_close(fed.scale[0], case["out_self_a_scale"])
    assert_close(cast(Tensor, fed.zero)[0], case["out_self_a_zero"])


def check_errors_of_outputs(case: Case) -> None:
    found = _method(case).searched(_block(case))
    theirs = _theirs(case)

    assert_close(found.grids[LINEAR].scale, theirs.grids[LINEAR].scale)
    assert_close(found.grids[LINEAR].zero, theirs.grids[LINEAR].zero)
    assert_close(found.inputs[LINEAR].scale, theirs.inputs[LINEAR].scale)
    assert_close(found.inputs[LINEAR].zero, theirs.inputs[LINEAR].zero)
    assert_close(found.grids[LINEAR].rounded(case["weight"]), case["out_w_nearest"])
    (part,) = _block(case).inspect(())
    assert_close(part.run(part.x, _nearest(found)), case["out_y_nearest"], atol=1e-5, rtol=1e-5)


def check_start_of_roundings(case: Case) -> None:
    alpha = undecided_at(case["weight"], _theirs(case).grids[LINEAR])
    rest = torch.linspace(0, case["iters"], case["iters"] + 1)[1:]
    exponents = [exponent_at(int(step), case["iters"]) or 20.0 for step in rest]

    assert_close(alpha, case["out_alpha0"], atol=1e-4, rtol=1e-4)
    assert_close(shares(alpha), case["out_soft0"], atol=1e-5, rtol=1e-5)
    assert_close(torch.tensor(exponents), case["out_b"])


def check_fitted_curvature(case: Case) -> None:
    off, slope = _off(case), pieces(case["grad"], alike=True).double()
    pairs = Pairs(off.shape[1])
    for start in range(0, len(off), 3):
        pairs.add(off[start : start + 3], slope[start : start + 3])
    found = pairs.fitted

    assert_close((off * slope).sum(-1), case["ref_dot"], rtol=1e-4, atol=1e-6)
    assert_close(found.diagonal.double(), case["ref_H"].clamp(min=0), rtol=1e-3, atol=1e-6)
    assert_close(found.direction.double(), case["ref_u"], rtol=1e-3, atol=1e-6)
    halves = Curvature(case["ref_H"].clamp(min=0), case["ref_u"])(off / 2)
    assert_close(halves, torch.tensor([case["ref_loss_diag"], case["ref_loss_low"]]).double(), rtol=1e-4, atol=0)


def check_squared_errors(case: Case) -> None:
    off = _off(case).float()
    terms, later = (Curvature(torch.ones(off.shape[1]), torch.zeros(off.shape[1]))(each) for each in (off, 0.5 * off))

    assert_close(balanced(later, terms, apart=False), case["out_loss_mse"][1], rtol=1e-4, atol=0)
    assert_close(terms[0] * 2 / case["weight"].shape[0], torch.tensor(case["out_raw_mse"]), rtol=1e-4, atol=0)


def check_learning(case: Case) -> None:
    method, block, start = _method(case), _block(case), _theirs(case)
    curvature = _Theirs(case["metric"], case["grad"])
    learned, firm = method.learned(block, start, cast(Curvature, curvature))

    assert_close(learned.inputs[LINEAR].scale[0], case["out_a_scale_trained"], rtol=1e-5, atol=0)
    weight = learned.grids[LINEAR].values(firm[LINEAR])
    assert ((weight - case["out_w_hard"]).abs() > 1e-5).float().mean() <= 0.01
    (part,) = block.inspect(())
    if torch.allclose(weight, case["out_w_hard"]):
        assert_close(part.run(part.x, learned.on_grids(firm)), case["out_y_hard"], atol=1e-4, rtol=1e-4)


class _OneLinear(OneBlock):
    """A linear alone as a block, which nothing but its input is handed."""

    part = "encoder"

    def run(self, block: nn.Module, number: int, batch: int, x: Tensor, whole: bool = True) -> Tensor:
        return cast(Tensor, block(x))


@dataclass(frozen=True)
class _Theirs:
    """The metrics that the vectors were trained with: squared errors, or weighed by squared gradients."""

    metric: int
    slope: Tensor

    def __call__(self, off: Tensor) -> Tensor:
        error = off.square().mean() if self.metric == 0 else (off * pieces(self.slope, alike=True)).square().mean()
        return torch.stack([error, torch.zeros_like(error)])


def _block(case: Case) -> Trial:
    linear = nn.Linear(*case["weight"].T.shape)
    linear.weight.data, linear.bias.data = case["weight"].clone(), case["bias"].clone()
    x = case["x"]
    replay = cast(Replay, _OneLinear(nn.Sequential(linear).requires_grad_(False), x, torch.ones(x.shape[:2])))
    states: dict[Stream, Sequence[Tensor]] = {"exact": [x], "reached": [x]}
    return Trial(replay, 0, states, cast(Slopes, None), print)


def _method(case: Mapping[str, Any]) -> LSViT:
    return LSViT(
        bits=case["w_bits"],
        activations=case["a_bits"],
        candidates=case["eq_n"],
        rounds=case["rounds"],
        steps=case["iters"],
        drop=0.0,
    )


def _theirs(case: Case) -> Rounded:
    grid = Grid(case["w_bits"], case["out_w_scale"][:, None], case["out_w_zero"][:, None])
    fed = Grid(case["a_bits"], case["out_a_scale"][None], case["out_a_zero"][None])
    return Rounded({LINEAR: case["weight"]}, {LINEAR: grid}, {LINEAR: fed})


def _nearest(found: Rounded) -> Any:
    return found.on_grids({name: found.grids[name].integers(weight) for name, weight in found.weights.items()})


def _off(case: Case) -> Tensor:
    made = functional.linear(case["x"], case["weight"], case["bias"])
    return pieces(case["out_y_nearest"] - made, alike=True).double()
