"""Rounding one column after another, each making up for the errors of those before (GPTQ, GPTAQ), and low ranks that whiten.

A linear's inputs are told by their second moments: ``H = (2 / N) sum x x^T`` over the rows of N samples that reach it, and,
where the model before it is quantized already, ``P = (2 / N) sum (exact - x) x^T`` with what the unquantized model feeds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.ops.grid import Grid

WIDE = 4096
"""Inputs from which on sums are float32, float64 below."""
TRIES = 4
"""How often a factorisation is tried, each time with ten times the damping."""

Finder = Callable[[Tensor, slice], Grid]
"""The grid of some columns of a weight, given the columns ``[out, n]`` and where they are among all."""


class Moments:
    """Second moments of a linear's inputs, added up batch by batch.

    Args:
        inputs: width n of the rows.
        paired: whether rows of the unquantized model come along.
        device: where the sums live.
    """

    def __init__(self, inputs: int, paired: bool = False, device: torch.device | None = None) -> None:
        self.samples = 0
        dtype = torch.float64 if inputs < WIDE else torch.float32
        self._own = torch.zeros(inputs, inputs, dtype=dtype, device=device)
        self._ahead = torch.zeros_like(self._own) if paired else None

    def add(self, x: Tensor, exact: Tensor | None = None, samples: int = 1) -> None:
        """Take ``x`` ``[t, n]``, rows of so many ``samples``, and what they are in the unquantized model."""
        x = x.to(self._own.dtype)
        self.samples += samples
        self._own.addmm_(x.mT, x)
        if self._ahead is not None and exact is not None:
            self._ahead.addmm_((exact.to(x.dtype) - x).mT, x)

    @property
    def own(self) -> Tensor:
        """H, ``[n, n]``."""
        return self._own * (2 / max(self.samples, 1))

    @property
    def ahead(self) -> Tensor | None:
        """P, ``[n, n]``: row of the difference, column of the input; None = not asked for."""
        return None if self._ahead is None else self._ahead * (2 / max(self.samples, 1))


def cholesky(matrix: Tensor, damping: float) -> tuple[Tensor, float]:
    """Lower factor of ``matrix`` ``[n, n]`` with ``damping`` of the mean diagonal added, and the damping that it took.

    Raises:
        FoveateError: if it has none even with a thousand times the damping.
    """
    mean = matrix.diagonal().mean()
    for _ in range(TRIES):
        damped = matrix.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            return lower, damping
        damping = 10 * damping if damping else 1e-6
    raise FoveateError(
        f"damping={damping / 10:g} is not enough to factorise the moments of {len(matrix)} inputs: are activations finite?"
    )


@dataclass(frozen=True, eq=False)
class Factored:
    """What the columns of every linear with the same inputs are rounded by.

    Attributes:
        upper: ``[n, n]`` U with ``U^T U = H^-1``, in the order of rounding.
        dead: ``[n]`` bool: inputs that were always 0; their weights become 0.
        damping: what the factorisation took.
        ahead: ``[n, n]`` strictly upper, what a column passes on to later ones as the inputs have moved; None = nothing.
        shift: ``[n]`` by which share a column's own target moves for the same reason; None = by none.
        order: ``[n]`` the columns in the order of rounding; None = as they come.
    """

    upper: Tensor
    dead: Tensor
    damping: float
    ahead: Tensor | None = None
    shift: Tensor | None = None
    order: Tensor | None = None

    @classmethod
    def of(
        cls,
        own: Tensor,
        ahead: Tensor | None = None,
        *,
        alpha: float = 0.25,
        correction: float = 0.0,
        damping: float = 0.01,
        ordered: bool = False,
    ) -> Self:
        """Factorise H and P.

        Args:
            own: H ``[n, n]``.
            ahead: P ``[n, n]``; None = GPTQ.
            alpha: share of GPTAQ's term; 0.25 in its code.
            correction: share of VLM-PTQ's correction vector.
            damping: share of the mean diagonal that is added to it.
            ordered: whether columns of large inputs come first.
        """
        dead = own.diagonal() == 0
        own = own.clone()
        own.diagonal().masked_fill_(dead, 1)
        order = own.diagonal().argsort(descending=True, stable=True) if ordered else None
        if order is not None:
            own = own[order][:, order]
        lower, damping = cholesky(own, damping)
        upper = torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True)
        if ahead is None:
            return cls(upper, dead, damping, order=order)
        ahead = ahead.masked_fill(dead, 0)
        if order is not None:
            ahead = ahead[order][:, order]
        passed = ahead @ upper.mT
        shift = correction * passed.diagonal() * upper.diagonal() if correction else None
        return cls(upper, dead, damping, alpha * passed.triu(1) @ upper, shift, order)

    def solve(
        self, weight: Tensor, find: Finder, group: int = -1, *, block: int = 128, static: bool = False
    ) -> tuple[Tensor, Grid]:
        """Integers ``[out, in]`` (int8 or uint8) for ``weight`` ``[out, in]``, and their grid.

        Args:
            find: what finds grids: of whole rows from the weight as it is; of groups when the turn of their first column
                comes, from columns that make up for all blocks before.
            group: inputs that share a step; -1 = all.
            block: columns that are rounded before the rest is made up for; changes grids of groups, and rounding only else.
            static: whether groups, too, have their grids from the weight as it is. If columns are reordered, they do.
        """
        count, width = weight.shape[1], weight.shape[1] if group == -1 else group
        static = static or self.order is not None or width == count
        # Inputs first: a column is a row, and contiguous.
        left = weight.to(self.upper.dtype).masked_fill(self.dead, 0).mT.contiguous()
        grids = [find(weight.to(left.dtype) if width == count else left.mT, slice(0, count))] if static else []
        turn = list(range(count)) if self.order is None else self.order.tolist()
        if self.order is not None:
            left = left[self.order]
        numbers = torch.empty_like(left)
        for start in range(0, count, block):
            stop = min(start + block, count)
            upper = self.upper[start:stop, start:stop]
            ahead = None if self.ahead is None else self.ahead[start:stop, start:stop]
            now, errors = left[start:stop].clone(), torch.empty_like(left[start:stop])
            for place in range(start, stop):
                if not static and place % width == 0:
                    columns = slice(place, place + width)
                    grids.append(find(left[columns].mT, columns))
                here = place - start
                grid, part = (grids[0], turn[place] // width) if static else (grids[-1], 0)
                scale, zero = grid.scale[:, part], None if grid.zero is None else grid.zero[:, part]
                column = now[here]
                target = column if self.shift is None else column * (1 + self.shift[place])
                number = (target / scale).round_()
                number = (number if zero is None else number.add_(zero)).clamp_(*grid.limits)
                value = (number if zero is None else number - zero) * scale
                error = (column - value) / upper[here, here]
                rest = now[here + 1 :]
                rest.addr_(upper[here, here + 1 :], error, alpha=-1)
                if ahead is not None:
                    rest.addr_(ahead[here, here + 1 :], column)
                numbers[place], errors[here] = number, error
                now[here] = value
            left[stop:].addmm_(self.upper[start:stop, stop:].mT, errors, alpha=-1)
            if self.ahead is not None:
                left[stop:].addmm_(self.ahead[start:stop, stop:].mT, now)
        if self.order is not None:
            numbers = torch.empty_like(numbers).index_copy_(0, self.order, numbers)
        grid = Grid.joined(grids)
        return numbers.mT.to(torch.int8 if grid.symmetric else torch.uint8).contiguous(), grid


def loss(weight: Tensor, rounded: Tensor, own: Tensor, ahead: Tensor | None = None) -> Tensor:
    """``[...]`` how far ``rounded`` ``[..., out, in]`` is from ``weight`` in the output, in units of the moments.

    ``sum |W exact - R x|^2 / 2`` less what no ``rounded`` can change (which is nothing without ``ahead``).
    """
    error = rounded.to(own.dtype) - weight.to(own.dtype)
    quadratic = ((error @ own) * error).sum((-2, -1))
    return quadratic if ahead is None else quadratic - 2 * (error * (weight.to(own.dtype) @ ahead)).sum((-2, -1))


def whitened(error: Tensor, moments: Tensor, rank: int, damping: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Factors ``[out, r]`` and ``[r, in]`` of rank ``rank`` whose product is nearest to ``error`` in the output.

    ``sum |(E - L R) x|^2`` is least for inputs of second moments ``moments`` ``[in, in]`` (any multiple of them).

    Args:
        damping: share of the mean diagonal that is added to it, more where fewer rows than inputs were seen.
    """
    # Inputs that were always 0 say nothing of what matters.
    lower, _ = cholesky(moments if bool(moments.any()) else torch.eye(len(moments)).to(moments), damping)
    left, size, right = torch.linalg.svd(error.to(lower.dtype) @ lower, full_matrices=False)
    right = torch.linalg.solve_triangular(lower, right[:rank], upper=False, left=False)
    return left[:, :rank] * size[:rank], right
