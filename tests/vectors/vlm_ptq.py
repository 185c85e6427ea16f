"""GPTAQ and GPTQ, the solver that VLM-PTQ extends: its code's sums, grids and weights."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.ops.grid import Grid
from foveate.ops.solve import Factored, Finder, Moments
from tests.vectors import Case

FLIPPED = 0.01
"""Share of weights that may lie on another point of the grid: float32 sums decide ties."""


def check_moments(case: Case) -> None:
    moments = _moments(case)

    for ours, theirs in ((moments.own, case["out_H"]), (moments.ahead, case["out_dXXT"])):
        assert ours is not None
        assert_close(ours.float(), theirs, rtol=1e-5, atol=1e-5 * float(theirs.abs().max()))


def check_weights(case: Case) -> None:
    moments = _moments(case)
    _same(case, moments.own, moments.ahead)


def check_without_the_unquantized_model(case: Case) -> None:
    """GPTQ where both models feed the linear the same."""
    if torch.equal(case["x_float"], case["x_quant"]):
        _same(case, _moments(case).own, None)


def check_grids(case: Case) -> None:
    if "out_scale" in case:
        grid = _finder(case)(case["weight"], slice(None))
        assert_close(grid.scale[:, 0], case["out_scale"], rtol=1e-5, atol=0)
        zero = torch.zeros_like(grid.scale) if grid.zero is None else grid.zero
        assert_close(zero[:, 0], case["out_zero"])


def _moments(case: Case) -> Moments:
    moments = Moments(case["weight"].shape[1], paired=True)
    for x, exact in zip(case["x_quant"], case["x_float"]):
        moments.add(x, exact)
    return moments


def _finder(case: Case) -> Finder:
    kind: dict[str, Any] = dict(bits=case["bits"], group=case["groupsize"], symmetric=bool(case["sym"]))
    find = partial(Grid.searched, power=2.4, **kind) if case["mse"] else partial(Grid.of, **kind)
    return lambda weight, columns: find(weight)


def _same(case: Case, own: Tensor, ahead: Tensor | None) -> None:
    factored = Factored.of(own, ahead, alpha=case["alpha"], damping=case["percdamp"], ordered=bool(case["actorder"]))
    integers, grid = factored.solve(
        case["weight"],
        _finder(case),
        case["groupsize"],
        block=case["blocksize"],
        static=bool(case["static_groups"]),
    )
    off = ~torch.isclose(grid.values(integers).float(), case["out_weight"], rtol=0, atol=1e-4)
    assert off.float().mean() <= FLIPPED
