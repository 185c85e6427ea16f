"""Subsets that are good and unlike each other: determinantal point processes."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.ranking import ranked

WORTH = 10
"""A row of the kernel made by itself takes as long as so many in one product."""
NEGLIGIBLE = 1e-6
"""Share of a token's own variance that float32 may leave of it when it lies in the span of others: it counts as nothing."""


@torch.no_grad()
def greedy_map(features: Tensor, quality: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Greedy maximum of ``det(K)`` over subsets, ``K_ij = quality_i cos(i, j) quality_j``.

    The incremental Cholesky factorisation of Chen et al. (arXiv 1709.05135), in float32: steps follow each other, images run
    side by side. Once the chosen ones span all features, the rest is filled up by index. Of the kernel all rows are made
    at once, or each when it is needed, whichever is faster.

    Args:
        features: ``[I, N, D]``, of any length.
        quality: ``[I, N]``, not negative.
        k: tokens to choose, at most N.

    Returns:
        ``[I, k]`` indices in the order of choice, and ``[I, k]`` gains: what each multiplied the determinant by.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    quality = ranked(quality.float())
    images, count, _ = unit.shape
    own = quality * torch.linalg.vector_norm(unit, dim=2).square() * quality
    kernel = unit @ unit.mT if count <= WORTH * k else None
    left, least = own.clone(), NEGLIGIBLE * own
    basis = unit.new_zeros(images, k, count)
    order, gains = [], []
    for step in range(k):
        best = left.argmax(1, keepdim=True)
        gain = left.gather(1, best)
        order.append(best)
        gains.append(gain)
        cosine = (unit @ _one(unit, best).mT)[..., 0] if kernel is None else _one(kernel, best)[:, 0]
        known = basis[:, :step]
        explained = (known.mT @ _one(known.mT, best).mT)[..., 0]
        row = quality.gather(1, best) * cosine * quality - explained
        # A token without anything of its own tells nothing about the others, and must not be divided by.
        basis[:, step] = torch.where(gain > 0, gain, torch.inf).rsqrt() * row
        left -= basis[:, step].square()
        left.masked_fill_(left < least, 0)
        for level in (left, least):  # it is never the best again, nor negligible
            level.scatter_(1, best, float("-inf"))
    return torch.cat(order, dim=1), torch.cat(gains, dim=1)


def _one(rows: Tensor, index: Tensor) -> Tensor:
    """Of ``[I, N, D]`` the row ``index`` ``[I, 1]`` of each: ``[I, 1, D]``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
