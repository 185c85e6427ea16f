"""Grids that weights are rounded to: whole numbers, and a step (and a zero) for each output row or each group of its inputs.

A weight ``[out, in]`` is cut along its inputs into groups of the same width. A grid has a step ``scale`` for each row and
group; its integers stand for ``(integer - zero) * scale``. Symmetric grids have no zero, and integers from
``-2 ** (bits - 1)`` on; asymmetric ones have integers from 0 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from foveate.core.errors import FoveateError

CLIPS = tuple(1 - step / 100 for step in range(80))
"""The shares of a row's range that GPTAQ's search tries."""
SLAB = 1 << 20
"""Weights that a search goes through at a time, so that what it needs besides the weight does not grow with it."""
LEAST = 1e-5
"""The smallest range that AWQ's grids and dynamic activations have."""


def divisors(inputs: int) -> list[int]:
    """Widths of groups that divide ``inputs`` and that kernels and formats know, the largest first."""
    return [group for group in (256, 128, 64, 32, 16, 8) if inputs % group == 0]


def grouped(weight: Tensor, group: int) -> Tensor:
    """``weight`` ``[..., in]`` as ``[..., groups, width]``, a view; ``group`` -1 is one group.

    Raises:
        FoveateError: if the groups do not divide the inputs.
    """
    width = weight.shape[-1] if group == -1 else group
    if width < 1 or weight.shape[-1] % width:
        fitting = ", ".join(map(str, [*divisors(weight.shape[-1]), -1]))
        raise FoveateError(f"group={group} does not divide the {weight.shape[-1]} inputs of a linear; one of {fitting} does")
    return cut(weight, weight.shape[-1] // width)


def cut(x: Tensor, parts: int) -> Tensor:
    """``x`` ``[..., n]`` as ``[..., parts, n / parts]``."""
    return x.reshape(*x.shape[:-1], parts, x.shape[-1] // parts)


def limits(bits: int, symmetric: bool, narrow: bool = False) -> tuple[int, int]:
    """Lowest and highest integer; ``narrow`` leaves out the lowest of a symmetric grid: as many on both sides of 0."""
    return (-(2 ** (bits - 1)) + narrow, 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)


@dataclass(frozen=True, eq=False)
class Grid:
    """A grid for a weight ``[out, in]``.

    Attributes:
        bits: of an integer, 2 to 8.
        scale: ``[out, groups]`` what a step is worth.
        zero: ``[out, groups]`` the integer that stands for 0, in the dtype of ``scale``; None = symmetric.
        narrow: whether a symmetric grid does without its lowest integer.
    """

    bits: int
    scale: Tensor
    zero: Tensor | None = None
    narrow: bool = False

    @classmethod
    def between(
        cls,
        low: Tensor,
        high: Tensor,
        bits: int,
        symmetric: bool = True,
        *,
        narrow: bool = False,
        stored: torch.dtype | None = None,
    ) -> Self:
        """Of the ranges ``low`` to ``high`` ``[out, groups]``; a symmetric grid takes the larger of the two magnitudes.

        Args:
            stored: the dtype that steps are written in: they are rounded to it here, before any weight is rounded to them:
                what is stored is what was searched.
        """
        least, most = limits(bits, symmetric, narrow)
        span = torch.maximum(low.abs(), high.abs()) if symmetric else high - low
        scale = span / (most if symmetric else most - least)
        if stored is not None:
            # A step that the dtype cannot hold would be a division by zero.
            scale = scale.clamp(min=torch.finfo(stored).tiny).to(stored).to(scale.dtype)
        return cls(bits, scale, None if symmetric else (-low / scale).round().clamp(least, most), narrow)

    @classmethod
    def of(
        cls,
        weight: Tensor,
        bits: int,
        group: int = -1,
        symmetric: bool = True,
        *,
        narrow: bool = False,
        stored: torch.dtype | None = None,
    ) -> Self:
        """From the least to the largest of each group of ``weight`` ``[out, in]``, 0 included (see `spans`)."""
        low, high = spans(weight, group)
        return cls.between(low, high, bits, symmetric, narrow=narrow, stored=stored)

    @classmethod
    def searched(
        cls,
        weight: Tensor,
        bits: int,
        group: int = -1,
        symmetric: bool = True,
        *,
        importance: Tensor | None = None,
        power: float = 2.0,
        clips: Sequence[float] = CLIPS,
        narrow: bool = False,
        stored: torch.dtype | None = None,
    ) -> Self:
        """The clip ratio of each row and group that makes ``sum importance * |error| ** power`` least; the first of equals.

        Args:
            weight: ``[out, in]``.
            importance: ``[in]`` or ``[out, in]``; None = all alike.
            power: 2.4 in GPTAQ's code.
            clips: shares of the range to try.
        """
        rows = max(SLAB // weight.shape[1], 1)
        if len(weight) > rows:
            grids = [
                cls.searched(
                    weight[start : start + rows],
                    bits,
                    group,
                    symmetric,
                    importance=importance
                    if importance is None or importance.ndim == 1
                    else importance[start : start + rows],
                    power=power,
                    clips=clips,
                    narrow=narrow,
                    stored=stored,
                )
                for start in range(0, len(weight), rows)
            ]
            return cls.joined(grids, dim=0)
        low, high = spans(weight, group)
        target = grouped(weight, group)
        heed = None if importance is None else grouped(importance.expand_as(weight).to(weight.dtype), group)
        best = torch.full_like(low, float("inf"))
        scale, zero = torch.ones_like(low), None if symmetric else torch.zeros_like(low)
        for clip in clips:
            grid = cls.between(low * clip, high * clip, bits, symmetric, narrow=narrow, stored=stored)
            error = (grid.rounded(weight).sub_(weight)).abs_().pow_(power).view_as(target)
            loss = (error if heed is None else error.mul_(heed)).sum(-1)
            better = loss < best
            best = torch.where(better, loss, best)
            scale = torch.where(better, grid.scale, scale)
            if zero is not None and grid.zero is not None:
                zero = torch.where(better, grid.zero, zero)
        return cls(bits, scale, zero, narrow)

    @property
    def symmetric(self) -> bool:
        """Whether there is no zero."""
        return self.zero is None

    @property
    def limits(self) -> tuple[int, int]:
        """Lowest and highest integer."""
        return limits(self.bits, self.symmetric, self.narrow)

    @property
    def groups(self) -> int:
        """Groups of a row."""
        return self.scale.shape[1]

    def numbers(self, weight: Tensor) -> Tensor:
        """The nearest integers to ``weight`` ``[out, in]`` (halves to even), in its dtype."""
        numbers = (cut(weight, self.groups) / self.scale[..., None].to(weight.dtype)).round_()
        if self.zero is not None:
            numbers += self.zero[..., None]
        return numbers.clamp_(*self.limits).flatten(-2)

    def integers(self, weight: Tensor) -> Tensor:
        """The same as int8 (symmetric) or uint8, ``[out, in]``."""
        return self.numbers(weight).to(torch.int8 if self.symmetric else torch.uint8)

    def values(self, integers: Tensor) -> Tensor:
        """What ``integers`` ``[out, in]`` stand for, in the dtype of the steps."""
        steps = cut(integers, self.groups).to(self.scale.dtype)
        return ((steps if self.zero is None else steps - self.zero[..., None]) * self.scale[..., None]).flatten(-2)

    def rounded(self, weight: Tensor) -> Tensor:
        """``weight`` ``[out, in]`` moved to the nearest points of the grid."""
        return self.values(self.numbers(weight)).to(weight.dtype)

    def passing(self, weight: Tensor) -> Tensor:
        """`rounded`, but with the gradients of ``weight`` and of the steps as if nothing had been rounded to a number."""
        ratio = cut(weight, self.groups) / self.scale[..., None]
        zero = 0 if self.zero is None else self.zero.detach()[..., None]
        least, most = self.limits
        return (straight(ratio, least - zero, most - zero) * self.scale[..., None]).flatten(-2)

    @classmethod
    def joined(cls, grids: Sequence[Self], dim: int = 1) -> Self:
        """One grid of the groups (of the rows, with ``dim`` 0) of all, which are of one kind."""
        zeros = [grid.zero for grid in grids if grid.zero is not None]
        scale = torch.cat([grid.scale for grid in grids], dim)
        return replace(grids[0], scale=scale, zero=torch.cat(zeros, dim) if zeros else None)


def spans(weight: Tensor, group: int = -1, zero: bool = True) -> tuple[Tensor, Tensor]:
    """Least and largest of each group of ``weight`` ``[out, in]``: ``[out, groups]`` both.

    Args:
        zero: whether 0 is within the range whatever the weights are (GPTAQ); a group of zeros then goes from -1 to 1.
            Without, a group is at least `LEAST` wide (AWQ).
    """
    low, high = grouped(weight, group).aminmax(dim=-1)
    if zero:
        low, high = low.clamp(max=0), high.clamp(min=0)
        empty = low == high
        return low.masked_fill(empty, -1), high.masked_fill(empty, 1)
    return low, torch.maximum(high, low + LEAST)


def straight(x: Tensor, least: Tensor | float, most: Tensor | float) -> Tensor:
    """``x`` rounded to whole numbers from ``least`` to ``most``; its gradient passes as if it was not."""
    given = x.detach()
    bounds = torch.as_tensor(least, dtype=x.dtype, device=x.device), torch.as_tensor(most, dtype=x.dtype, device=x.device)
    return x + (given.round().clamp(*bounds) - given)


def passing(x: Tensor, bits: int) -> Tensor:
    """`tokens`, but with the gradients of ``x`` and of its steps as if nothing had been rounded to a number."""
    if bits >= 16:
        return x
    least, most = limits(bits, symmetric=True)
    scale = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) / most
    return straight(x / scale, least, most) * scale


def tokens(x: Tensor, bits: int, symmetric: bool = True, clip: float = 1.0) -> Tensor:
    """Activations ``x`` ``[..., in]``, each row rounded to a grid of its own range (dynamic, per token).

    Args:
        bits: of an integer; 16 and more = as they are.
        clip: the share of the range that is kept; GPTAQ's code has 0.9.
    """
    if bits >= 16:
        return x
    least, most = limits(bits, symmetric)
    if symmetric:
        scale = x.abs().amax(-1, keepdim=True).clamp(min=LEAST) * (clip / most)
        return (x / scale).round_().clamp_(least, most) * scale
    low, high = (edge.unsqueeze(-1) * clip for edge in x.aminmax(dim=-1))
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = (high - low).clamp(min=LEAST) / most
    zero = (-low / scale).round()
    return ((x / scale).round_().add_(zero).clamp_(least, most) - zero) * scale


def packed(levels: Tensor, bits: int) -> Tensor:
    """``levels`` ``[..., n]`` from 0 to ``2 ** bits - 1`` as int32 words ``[..., ceil(n * bits / 32)]``, the first lowest.

    No bit is left between two levels, so one may lie in two words (the layout of compressed-tensors from 0.20 on).
    """
    count = levels.shape[-1]
    whole = torch.nn.functional.pad(levels.to(torch.int64), (0, -count % 32))
    whole = cut(whole, whole.shape[-1] // 32)
    words = whole.new_zeros(*whole.shape[:-1], bits + 1)  # one more for what runs over the last
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        moved = whole[..., place] << shift
        words[..., word] |= moved & 0xFFFFFFFF
        words[..., word + 1] |= moved >> 32
    words = words[..., :bits].flatten(-2)[..., : -(-count * bits // 32)]
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def unpacked(words: Tensor, bits: int, count: int) -> Tensor:
    """Back: ``[..., count]`` uint8."""
    whole = words.to(torch.int64) & 0xFFFFFFFF
    whole = torch.nn.functional.pad(whole, (0, -whole.shape[-1] % bits))
    whole = torch.nn.functional.pad(cut(whole, whole.shape[-1] // bits), (0, 1))
    levels = []
    for place in range(32):
        word, shift = divmod(place * bits, 32)
        pair = whole[..., word] | (whole[..., word + 1] << 32) if shift + bits > 32 else whole[..., word]
        levels.append((pair >> shift) & (2**bits - 1))
    return torch.stack(levels, dim=-1).flatten(-2)[..., :count].to(torch.uint8)
