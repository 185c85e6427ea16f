"""DASQ: a symmetric grid of few bits for all weights, and a second one for the two in a hundred that it serves worst.

Paper: "Rethinking Asymmetric Quantization: Hidden Symmetry in Vision Model Weights", CVPR 2026. No published code; the
card's worked example and closed forms hold it. Weights of the vision encoder; no samples. Reconstructed: that integers do
without the lowest (`narrow`), that each linear shares out its sparse weights among its rows (`by_row`), the candidates of
both steps, and when the rounds end. Rounds start with nothing sparse, and once more with the largest weights; the better end
is kept, and plain rounding on the best grid where that is better still. Rows of fewer than 32 weights get a plain asymmetric
grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from foveate.core.parameters import AtLeast, In
from foveate.core.registry import register
from foveate.core.weights import Bits, Block, Replaced, Sparse, Stream, Weights
from foveate.ops.grid import Grid, limits

CANDIDATES = tuple(step / 100 for step in range(100, 0, -1))
"""Shares of a row's largest weight that the dense step is searched among."""
LOWER = 4
"""Powers of two that the sparse step is searched among: the one that cuts nothing off, and those below."""
FEWEST = 32
"""Weights of a row from which on it is taken apart."""


@dataclass(frozen=True, eq=False)
class Parts:
    """A weight ``[out, in]`` taken apart.

    Attributes:
        grid: of the dense part.
        integers: ``[out, in]`` of the dense part.
        added: ``[out, in]`` int8 integers of the sparse part, 0 where there is none.
        scale: ``[out, 1]`` their step: the dense one times a power of two.
        error: sum of squares of what is missing.
    """

    grid: Grid
    integers: Tensor
    added: Tensor
    scale: Tensor
    error: Tensor


def largest(size: Tensor, count: int) -> Tensor:
    """Bool, in the shape of ``size`` ``[..., n]``: the ``count`` largest of the last axis, the first of equals."""
    if not count:
        return torch.zeros_like(size, dtype=torch.bool)
    least = size.topk(count, dim=-1).values[..., -1:]
    above, equal = size > least, size == least
    return above | (equal & (equal.cumsum(-1) <= count - above.sum(-1, keepdim=True)))


def outliers(size: Tensor, density: float, by_row: bool) -> Tensor:
    """Bool ``[out, in]``: the ``density`` largest of ``size``, rounded down, in the matrix or in each row."""
    if by_row:
        return largest(size, int(density * size.shape[1]))
    return largest(size.flatten(), int(density * size.numel())).view_as(size)


def refined(target: Tensor, grid: Grid, stored: torch.dtype | None = None) -> Grid:
    """The steps ``[out, 1]`` that are best for the integers that ``grid`` gives ``target``: least squares, row by row."""
    numbers = grid.numbers(target)
    square = numbers.square().sum(1, keepdim=True)
    scale = (target * numbers).sum(1, keepdim=True) / square.clamp(min=1)
    scale = torch.where(scale > 0, scale, grid.scale)
    if stored is not None:
        scale = scale.clamp(min=torch.finfo(stored).tiny).to(stored).to(scale.dtype)
    return replace(grid, scale=scale)


def added(residual: Tensor, there: Tensor, step: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Integers ``[out, in]`` from ``-most`` to ``most`` for ``residual`` where it is ``there``, and their step ``[out, 1]``.

    The step is ``step`` ``[out, 1]`` times the power of two that leaves the least error; the larger of equals.
    """
    residual = residual * there
    top = (residual.abs().amax(1, keepdim=True) / (most * step)).clamp(min=2.0**-20).log2().ceil()
    best, numbers, scale = None, torch.zeros_like(residual), step
    for lower in range(LOWER):
        trial = step * (top - lower).exp2()
        found = (residual / trial).round().clamp(-most, most)
        error = (found * trial - residual).square().sum(1, keepdim=True)
        better = error < best if best is not None else torch.ones_like(error, dtype=torch.bool)
        best = error if best is None else torch.where(better, error, best)
        numbers, scale = torch.where(better, found, numbers), torch.where(better, trial, scale)
    return numbers, scale


def decomposed(
    weight: Tensor,
    bits: int,
    sparse_bits: int = 4,
    density: float = 0.02,
    *,
    narrow: bool = True,
    by_row: bool = False,
    rounds: int = 20,
    stop: float = 1e-3,
    stored: torch.dtype | None = None,
) -> Parts:
    """Take ``weight`` ``[out, in]`` apart.

    Args:
        bits, sparse_bits: of either part's integers.
        density: share of weights that have a sparse part.
        narrow: whether the dense grid does without its lowest integer.
        by_row: whether that share is each row's, or the whole matrix's.
        rounds: at most, from either start.
        stop: relative change of the steps, both means together, at which rounds end.
        stored: the dtype that steps are written in.
    """

    def searched(target: Tensor) -> Grid:
        return Grid.searched(target, bits, clips=CANDIDATES, narrow=narrow, stored=stored)

    plain, nothing, most = searched(weight), torch.zeros_like(weight), limits(sparse_bits, True)[1]
    best = Parts(
        plain, plain.integers(weight), nothing.to(torch.int8), plain.scale, (plain.rounded(weight) - weight).square().sum()
    )
    for sparse in (nothing, weight * outliers(weight.abs(), density, by_row)):
        grid, scale = searched(weight - sparse), plain.scale
        for _ in range(rounds):
            before = grid.scale, scale
            grid = refined(weight - sparse, grid, stored)
            integers = grid.integers(weight - sparse)
            residual = weight - grid.values(integers)
            numbers, scale = added(residual, outliers(residual.abs(), density, by_row), grid.scale, most)
            sparse = numbers * scale
            error = (residual - sparse).square().sum()
            if error < best.error:
                best = Parts(grid, integers, numbers.to(torch.int8), scale, error)
            change = sum((now / then - 1).abs().mean() for now, then in zip((grid.scale, scale), before, strict=True))
            if change < stop:
                break
    return best


@register
@dataclass(frozen=True)
class DASQ(Weights):
    """Dense and sparse symmetric grids."""

    name = "dasq"
    title = "DASQ"
    group = "weights"
    paper = "CVPR 2026"
    helps = "For a vision encoder in 4 bits or fewer, without samples, where few weights are far larger than the others."
    part = "encoder"
    textual = False
    streams: ClassVar[tuple[Stream, ...]] = ()
    ordinary: ClassVar[bool] = False
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16}

    bits: Bits = 3
    """Bits of a weight's dense part; 16 leaves the model as it is."""
    group_size: Literal[-1] = -1
    """Inputs that share a step: all of a row."""
    symmetric: Literal[True] = True
    """Whether grids are symmetric: they are."""
    sparse_bits: Annotated[int, In(2, 8)] = 4
    """Bits of a weight's sparse part."""
    density: Annotated[float, In(0, 1)] = 0.02
    """Share of weights that have a sparse part."""
    narrow: bool = True
    """Whether the dense grid does without its lowest integer, and so has as many on both sides of 0."""
    by_row: bool = False
    """Whether each row has that share of its own weights, or each linear of all its weights."""
    rounds: Annotated[int, AtLeast(1)] = 20
    """Rounds at most, from either start."""

    def quantize(self, block: Block) -> None:
        """Place every linear, one like the other."""
        for name in (name for names in block.groups for name in names):
            weight = block.weight(name)
            if weight.shape[1] < FEWEST:
                grid = Grid.of(weight, self.bits, symmetric=False, stored=block.dtype)
                block.place(name, Replaced(grid, grid.integers(weight), activations=self.activations))
                continue
            found = decomposed(
                weight,
                self.bits,
                self.sparse_bits,
                self.density,
                narrow=self.narrow,
                by_row=self.by_row,
                rounds=self.rounds,
                stored=block.dtype,
            )
            sparse = Sparse.of(found.added, found.scale, self.sparse_bits)
            block.place(name, Replaced(found.grid, found.integers, activations=self.activations, sparse=sparse))
