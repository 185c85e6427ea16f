"""Rounding that is learned: to which of its two neighbours on a grid each weight goes (AdaRound), and steps of inputs.

Each weight has a number ``alpha``; the share ``clamp(1.2 * sigmoid(alpha) - 0.1, 0, 1)`` of a step is what it is rounded up
by while it is learned, and in the end it goes up where ``alpha >= 0``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.grid import Grid, cut

LOW, HIGH = -0.1, 1.1
"""Ends between which shares lie before they are cut off at 0 and 1, so that these are reached."""


def shares(alpha: Tensor) -> Tensor:
    """By which share of a step each weight is rounded up, in ``[0, 1]``."""
    return (alpha.sigmoid() * (HIGH - LOW) + LOW).clamp(0, 1)


def undecided_at(weight: Tensor, grid: Grid) -> Tensor:
    """``[out, in]`` alpha at which every weight ``[out, in]`` within the grid stays what it is."""
    steps = cut(weight, grid.groups) / grid.scale[..., None]
    rest = (steps - steps.floor()).flatten(-2)
    return -((HIGH - LOW) / (rest - LOW) - 1).log()


def softened(weight: Tensor, grid: Grid, share: Tensor) -> Tensor:
    """``[out, in]`` the weight rounded down and then up by ``share`` ``[out, in]`` of a step; differentiable in it."""
    return grid.values(_numbers(weight, grid, share))


def hardened(weight: Tensor, grid: Grid, alpha: Tensor) -> Tensor:
    """``[out, in]`` integers (int8, or uint8 with zeros) of what was learned."""
    numbers = _numbers(weight, grid, (alpha >= 0).to(weight.dtype))
    return numbers.to(torch.int8 if grid.symmetric else torch.uint8)


def indecision(share: Tensor, exponent: float) -> Tensor:
    """Sum of ``1 - |2 share - 1| ** exponent``: 0 once every weight has gone one way."""
    return (1 - (2 * share - 1).abs().pow(exponent)).sum()


def exponent_at(step: int, steps: int, free: float = 0.2, first: float = 20.0, last: float = 2.0) -> float | None:
    """The exponent of `indecision` at ``step`` of 1 to ``steps``: linearly from ``first`` to ``last``; None = not yet.

    Args:
        free: share of the steps in which nothing is to be decided.
    """
    if step < free * steps:
        return None
    return last + (first - last) * max(0.0, 1 - (step - free * steps) / ((1 - free) * steps))


def levelled(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """``x`` moved to the nearest of ``2 ** bits`` levels, whose gradient passes rounding straight through.

    Args:
        scale: of a step, a number; it gets a gradient.
        zero: which level stands for 0, a number.
    """
    steps = x / scale
    steps = steps + (steps.round() - steps).detach()
    return ((steps + zero).clamp(0, 2**bits - 1) - zero) * scale


def mixed(exact: Tensor, rounded: Tensor, share: float) -> Tensor:
    """Each entry ``exact`` by this chance, else ``rounded`` (QDrop), both of one shape."""
    return torch.where(torch.rand_like(exact, dtype=torch.float32) < share, exact, rounded)


def _numbers(weight: Tensor, grid: Grid, share: Tensor) -> Tensor:
    numbers = (cut(weight, grid.groups) / grid.scale[..., None]).floor() + cut(share, grid.groups)
    if grid.zero is not None:
        numbers = numbers + grid.zero[..., None]
    return numbers.clamp(*grid.limits).flatten(-2)
