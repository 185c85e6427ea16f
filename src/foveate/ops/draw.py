"""Random choices that a seed repeats."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(count: int, k: int, seed: int, number: int) -> Tensor:
    """``k`` of ``count`` indices ``[k]``, ascending.

    The draw depends on the seed, the place of the image in its prompt and its size alone: never on the batch row, so
    that a sample gets the same tokens alone, in a batch, and in every beam.
    """
    mixed = ((seed * 1_000_003 + number) * 1_000_003 + count) % 2**63
    generator = torch.Generator().manual_seed(mixed)
    return torch.randperm(count, generator=generator)[:k].sort().values
