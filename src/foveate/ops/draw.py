"""Random choices that a seed repeats."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(count: int, k: int, seed: int, number: int) -> Tensor:
    """``k`` of ``count`` indices ``[k]``, ascending.

    The draw depends on the seed, the place of the image in its prompt and its size alone: never on the batch row, so
    that a sample gets the same tokens alone, in a batch, and in every beam.
    """
    return torch.randperm(count, generator=_generator(count, seed, number))[:k].sort().values


def chances(count: int, heads: int, seed: int, number: int) -> Tensor:
    """``[heads, count]`` float32 in [0, 1), on the CPU: what each head ranks ``count`` entries by that it draws at random.

    As `draw`, it depends on nothing else; ``number`` is that of the layer.
    """
    return torch.rand(heads, count, generator=_generator(count, seed, number))


def _generator(count: int, seed: int, number: int) -> torch.Generator:
    mixed = ((seed * 1_000_003 + number) * 1_000_003 + count) % 2**63
    return torch.Generator().manual_seed(mixed)
