"""Keys and values in a few bits each: keys by channel, values by token, in groups that share a scale and a lowest value."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import gcd

import torch
from torch import Tensor

from foveate.core.store import Turn
from foveate.ops.rebuilt import Rebuilt, selected


def quantize(x: Tensor, bits: int, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Whole numbers of ``bits`` bits (uint8) between the least and the largest of each group, which lies along ``dim``.

    Returns:
        The numbers, in the shape of ``x``; what a step is worth and what 0 stands for, 1 wide at ``dim``, in its dtype.
    """
    low, high = x.aminmax(dim=dim, keepdim=True)
    step = ((high - low) / (2**bits - 1)).to(x.dtype)
    exact = torch.promote_types(x.dtype, torch.float32)
    # Of the step as it is stored; a group of equals has none.
    number = (x.to(exact) - low.to(exact)) / step.to(exact).masked_fill(step == 0, 1)
    return number.round().clamp(0, 2**bits - 1).to(torch.uint8), step, low


def together(numbers: Tensor, bits: int) -> Tensor:
    """Numbers ``[..., n]`` of so many ``bits``, packed into bytes ``[..., n * bits / 8]``, the first in the lowest bits."""
    shift = torch.arange(0, 8, bits, device=numbers.device, dtype=torch.uint8)
    moved: Tensor = numbers.reshape(*numbers.shape[:-1], -1, len(shift)) << shift
    return moved.sum(-1, dtype=torch.uint8)


def apart(packed: Tensor, bits: int) -> Tensor:
    """Back."""
    shift = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    numbers: Tensor = (packed[..., None] >> shift) & (2**bits - 1)
    return numbers.flatten(-2)


@dataclass(frozen=True, eq=False)
class Few:
    """A tensor ``[B, Hkv, n, d]`` in a few bits.

    Attributes:
        packed: ``[B, Hkv, n * d * bits / 8]`` uint8.
        step, low: of each group, as `quantize` returns them.
        bits: of a number.
        cut: its last two axes, of which one is cut into groups: ``(groups, size, d)`` along the tokens, by channel, or
            ``(n, groups, size)`` along the channels, by token.
        dim: the axis that was cut, -2 or -1.
    """

    packed: Tensor
    step: Tensor
    low: Tensor
    bits: int
    cut: tuple[int, int, int]
    dim: int

    @classmethod
    def of(cls, x: Tensor, bits: int, group: int, dim: int) -> Few:
        """``x`` in groups of ``group`` along ``dim``, which they fill."""
        count, width = x.shape[2:]
        cut = (count // group, group, width) if dim == -2 else (count, width // group, group)
        numbers, step, low = quantize(x.reshape(*x.shape[:2], *cut), bits, dim)
        return cls(together(numbers.flatten(2), bits), step, low, bits, cut, dim)

    @property
    def nbytes(self) -> int:
        """Bytes of numbers, steps and lowest values."""
        return self.packed.nbytes + self.step.nbytes + self.low.nbytes

    @property
    def whole(self) -> Tensor:
        """``[B, Hkv, n, d]``."""
        numbers = apart(self.packed, self.bits).to(self.low.dtype).reshape(*self.packed.shape[:2], *self.cut)
        return torch.addcmul(self.low, numbers, self.step).flatten(self.dim - 1, self.dim)

    def batched(self, index: Tensor) -> Few:
        """With the batch entries ``index``."""
        return replace(self, packed=self.packed[index], step=self.step[index], low=self.low[index])


@dataclass(frozen=True, eq=False)
class Quantized(Rebuilt):
    """Entries in a few bits, keys as they were cached.

    Attributes:
        keys: by channel; values: by token.
        there: ``[B, n]`` bool: columns in use; None = all.
    """

    keys: Few
    values: Few
    there: Tensor | None = None

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, bits: int, group: int, there: Tensor | None = None) -> Quantized:
        """Of ``keys`` and ``values`` ``[B, Hkv, n, d]``, n a multiple of ``group``.

        Where a value's width is no multiple of it, its groups are as wide as the largest number that divides both.
        """
        wide = gcd(group, values.shape[3])
        return cls(Few.of(keys, bits, group, -2), Few.of(values, bits, wide, -1), there)

    @property
    def columns(self) -> int:
        """The n."""
        groups, size, _ = self.keys.cut
        return groups * size

    @property
    def nbytes(self) -> int:
        """Bytes of all that is held."""
        return self.keys.nbytes + self.values.nbytes + (0 if self.there is None else self.there.nbytes)

    def batched(self, index: Tensor) -> Quantized:
        """See `Store.batched`."""
        index = index.to(self.keys.packed.device)
        return replace(
            self, keys=self.keys.batched(index), values=self.values.batched(index), there=selected(self.there, index)
        )

    def rebuilt(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """See `Rebuilt.rebuilt`; nothing is turned, as keys were quantized behind their rotation."""
        return self.keys.whole, self.values.whole
