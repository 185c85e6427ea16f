"""The discrete cosine transform along the rows of a sequence, of as many of its frequencies as are needed."""

from __future__ import annotations

from collections.abc import Sequence
from math import pi

import torch
from torch import Tensor

from foveate.core.device import upload

CHUNK = 128
"""Frequencies whose waves are held at a time, over all rows."""


def waves(nth: Tensor, counts: Tensor, frequencies: Tensor) -> Tensor:
    """Rows of the orthonormal DCT-II of each sample's own length, float32.

    Args:
        nth: ``[B, n]`` number of each row among those of its sample, from 0; -1 = none of them.
        counts: ``[B]`` rows of each sample.
        frequencies: ``[F]`` from 0; those that a sample of so many rows lacks are 0 throughout.

    Returns:
        ``[B, F, n]``.
    """
    # A sample without any rows has no waves, but nothing may be divided by their number.
    some, frequency = counts.clamp(min=1)[:, None, None], frequencies[:, None]
    # Whole turns are left out in integers: far from the start of a long sequence the angle is as exact as at its start.
    turn = (2 * nth + 1)[:, None] * frequency % (4 * some)
    length = (2 - (frequency == 0).int()) / some
    wave = (turn * (pi / 2 / some)).cos() * length.sqrt()
    return wave.masked_fill((nth < 0)[:, None] | (frequency >= counts[:, None, None]), 0)


def low_pass(x: Tensor, rows: Tensor, counts: Sequence[int], highest: Sequence[int]) -> Tensor:
    """What the lowest frequencies make of each sample's rows, float32: two thin matrix products, no full transform.

    Args:
        x: ``[B, n, C]``, each channel a sequence of its own.
        rows: ``[B, n]`` bool: the sequence, in order; others have no say.
        counts: rows of each sample.
        highest: of each sample, the highest frequency that stays, 0 being the mean; all stay from ``counts - 1`` on.

    Returns:
        ``[B, n, C]``, 0 at all other rows.
    """
    x, inside = x.float().masked_fill(~rows[..., None], 0), rows[..., None]
    nth = (rows.long().cumsum(1) - 1).masked_fill(~rows, -1)
    count, last = upload(list(counts), x.device), upload(list(highest), x.device)
    mean = x.sum(1, keepdim=True) / count.clamp(min=1)[:, None, None]
    # The mean is all that frequency 0 holds. Without it small waves are not lost beside a large one.
    centred = (x - mean).masked_fill(~inside, 0)
    smooth = mean.repeat(1, x.shape[1], 1).masked_fill(~inside, 0)
    for start in range(1, min(max(highest, default=0), max(counts, default=1) - 1) + 1, CHUNK):
        frequencies = torch.arange(start, min(start + CHUNK, max(highest) + 1), device=x.device)
        wave = waves(nth, count, frequencies).masked_fill((frequencies > last[:, None])[..., None], 0)
        smooth.baddbmm_(wave.mT, wave @ centred)
    return torch.where((last >= count - 1)[:, None, None], x, smooth)
