"""Steps and zeros by trial: out of many that are offered, those that change a weight, or what a linear makes, least.

On offer are steps for ranges from that between the first and the last tenth of numbers to the whole one, each with zeros
around the middle of the grid (symmetric: just there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from foveate.ops.grid import Grid, cut
from foveate.ops.solve import Moments

ZEROS = 16
"""Zeros on offer, at most."""
INNER = 0.9
"""The quantile at which the smallest range on offer ends, and begins on the other side."""
SMALLEST = 1e-4
"""Of a step of inputs."""
MOST = 1 << 22
"""Numbers of which quantiles are taken at a time; torch refuses four times as many."""


@dataclass(frozen=True, eq=False)
class Offered:
    """Grids to choose from, zeros from the lowest on, for each of them all steps from the smallest on.

    Attributes:
        bits: of an integer.
        scale: ``[S, out, groups]`` steps.
        zeros: ``[Z]``; None = symmetric.
    """

    bits: int
    scale: Tensor
    zeros: Tensor | None

    @classmethod
    def of(
        cls,
        inner: Tensor,
        whole: Tensor,
        bits: int,
        count: int = 128,
        symmetric: bool = False,
        least: float = 0.0,
        stored: torch.dtype | None = None,
    ) -> Offered:
        """``count`` grids for ranges from ``inner`` to ``whole``, ``[out, groups]`` both.

        Args:
            least: the smallest step.
            stored: the dtype that steps are written in.
        """
        zeros = None if symmetric else torch.arange(min(ZEROS, 2**bits), device=inner.device).to(inner.dtype)
        steps = max(1, count // (1 if zeros is None else len(zeros)))
        share = torch.linspace(0, 1, steps, device=inner.device, dtype=inner.dtype)[:, None, None]
        scale = (inner + share * (whole - inner)) / (2**bits - 1)
        if stored is not None:
            scale = scale.to(stored).to(scale.dtype)
        # A row of zeros has no range, and some dtypes cannot hold what it has.
        scale = scale.clamp(min=max(least, torch.finfo(stored or scale.dtype).tiny))
        return cls(bits, scale, None if zeros is None else zeros + (2 ** (bits - 1) - len(zeros) // 2))

    def __len__(self) -> int:
        return len(self.scale) * (1 if self.zeros is None else len(self.zeros))

    def __getitem__(self, number: int) -> Grid:
        """The grid of this number, the same one for each row and group."""
        scale = self.scale[number % len(self.scale)]
        zero = None if self.zeros is None else self.zeros[number // len(self.scale)].expand_as(scale)
        return Grid(self.bits, scale, zero)

    def best(self, loss: Callable[[Grid], Tensor]) -> Grid:
        """For each row and group the grid with the least ``loss`` (``[out, groups]``), the first of equals."""
        first = self[0]
        least = torch.full(first.scale.shape, torch.inf, device=first.scale.device, dtype=torch.float64)
        scale, zero = first.scale, first.zero
        for grid in map(self.__getitem__, range(len(self))):
            found = loss(grid).double()
            better = found < least
            least, scale = torch.where(better, found, least), torch.where(better, grid.scale, scale)
            if zero is not None and grid.zero is not None:
                zero = torch.where(better, grid.zero, zero)
        return Grid(self.bits, scale, zero)


def for_weight(
    weight: Tensor, bits: int, groups: int, count: int, symmetric: bool, stored: torch.dtype | None = None
) -> Offered:
    """What is on offer for ``weight`` ``[out, in]``, its rows in so many ``groups``."""
    parts = cut(weight, groups)
    if symmetric:
        size, rows = parts.abs(), max(1, MOST // weight.shape[1])
        inner = torch.cat([some.quantile(INNER, -1) for some in torch.split(size, rows)])
        return Offered.of(2 * inner, 2 * size.amax(-1), bits, count, True, stored=stored)
    ends, rows = parts.new_tensor([1 - INNER, INNER]), max(1, MOST // weight.shape[1])
    low, high = torch.cat([some.quantile(ends, dim=-1) for some in torch.split(parts, rows)], dim=1)
    return Offered.of(high - low, parts.amax(-1) - parts.amin(-1), bits, count, stored=stored)


def for_inputs(x: Tensor, low: Tensor, high: Tensor, bits: int, count: int) -> Offered:
    """What is on offer for inputs that reach from ``low`` to ``high`` (numbers), of which ``x`` are some."""
    flat = x.float().flatten()
    near, far = flat[:: -(-len(flat) // MOST)].quantile(torch.tensor([1 - INNER, INNER], device=x.device))
    return Offered.of((far - near).view(1, 1), (high - low).float().view(1, 1), bits, count, least=SMALLEST)


def nearest(offered: Offered, weight: Tensor) -> Grid:
    """The grids that change ``weight`` ``[out, in]`` itself least, in squares."""
    groups = offered.scale.shape[-1]
    return offered.best(lambda grid: cut(grid.rounded(weight) - weight, groups).square().mean(-1))


def nearest_inputs(offered: Offered, x: Tensor) -> Grid:
    """The grid that changes inputs ``x`` ``[n, in]`` themselves least, in squares."""
    return offered.best(lambda grid: (grid.rounded(x) - x).square().mean().view(1, 1))


def by_output(offered: Offered, weight: Tensor, moments: Moments) -> Grid:
    """The grids that change least what ``weight`` ``[out, in]`` makes, in squares, each group for itself.

    Args:
        moments: of the rounded inputs, paired with the exact ones, or of exact ones alone.
    """
    groups = offered.scale.shape[-1]
    own, parts = _blocks(moments.own, groups), cut(weight, groups).to(moments.own.dtype)
    # What a changed weight makes up for of the error of its inputs.
    ahead = moments.ahead
    owed = torch.zeros_like(parts) if ahead is None else torch.einsum("ogj,gji->ogi", parts, _blocks(ahead, groups))

    def loss(grid: Grid) -> Tensor:
        change = cut(grid.rounded(weight), groups).to(parts.dtype) - parts
        return ((torch.einsum("ogi,gij->ogj", change, own) - 2 * owed) * change).sum(-1)

    return offered.best(loss)


def by_input(offered: Offered, x: Tensor, weights: Sequence[Tensor], rounded: Sequence[Tensor]) -> Grid:
    """The grid of inputs ``x`` ``[n, in]`` with which rounded weights make most nearly what ``weights`` make of ``x``."""
    weight, stand = torch.cat([*weights]), torch.cat([*rounded])
    wanted = functional.linear(x, weight)
    return offered.best(lambda grid: (functional.linear(grid.rounded(x), stand) - wanted).square().mean().view(1, 1))


def _blocks(square: Tensor, groups: int) -> Tensor:
    """``[groups, width, width]`` on the diagonal of a square matrix."""
    width = len(square) // groups
    return square.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
