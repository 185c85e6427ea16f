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
    image = torch.arange(images, device=unit.device)
    own = quality * torch.linalg.vector_norm(unit, dim=2).square() * quality
    kernel = unit @ unit.mT if count <= WORTH * k else None
    left = own.clone()
    basis = unit.new_zeros(images, k, count)
    taken = torch.zeros_like(left, dtype=torch.bool)
    order, gains = [], []
    for step in range(k):
        best = left.masked_fill(taken, float("-inf")).argmax(1)
        gain = left[image, best]
        order.append(best)
        gains.append(gain)
        taken[image, best] = True
        cosine = (unit @ unit[image, best][..., None])[..., 0] if kernel is None else kernel[image, best]
        known = basis[:, :step]
        explained = (known.mT @ known[image, :, best][..., None])[..., 0]
        row = quality[image, best][:, None] * cosine * quality - explained
        # A token without anything of its own tells nothing about the others, and must not be divided by.
        basis[:, step] = torch.where(gain > 0, gain, torch.inf).rsqrt()[:, None] * row
        left = left - basis[:, step].square()
        left = left.masked_fill(left < NEGLIGIBLE * own, 0)
    return torch.stack(order, dim=1), torch.stack(gains, dim=1)
