"""Subsets that are good and unlike each other: determinantal point processes."""

from __future__ import annotations

from collections.abc import Callable

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

    Once the chosen ones span all features, the rest is filled up by index.

    Args:
        features: ``[I, N, D]``, of any length.
        quality: ``[I, N]``, not negative.
        k: tokens to choose, at most N.

    Returns:
        ``[I, k]`` indices in the order of choice, and ``[I, k]`` gains: what each multiplied the determinant by.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1)
    return pivoted(unit * ranked(quality.float())[..., None], k)


@torch.no_grad()
def pivoted(
    rows: Tensor, k: int, score: Callable[[Tensor], Tensor] = lambda left: left, ridge: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Choose tokens one by one, by what the chosen ones leave of them: a Cholesky factorisation that picks its pivots.

    The incremental factorisation of Chen et al. (arXiv 1709.05135), in float32: steps follow each other, images run side by
    side. What float32 cannot tell from nothing counts as nothing. Of the products of the rows all are made at once, or those
    with one row when they are needed, whichever is faster.

    Args:
        rows: ``[I, N, D]``, K is their Gram matrix.
        k: tokens to choose, at most N.
        score: of what is left of each token ``[I, N]``, nan for those that were taken; the largest is taken, of equals the
            one with the lowest index.
        ridge: ``[I, 1]`` added to K's diagonal; None = 0.

    Returns:
        ``[I, k]`` indices in the order of choice, and ``[I, k]`` gains: what each multiplied the determinant by.
    """
    images, count, _ = rows.shape
    own = torch.linalg.vector_norm(rows, dim=2).square()
    least, spare = NEGLIGIBLE * own, own.new_zeros(images, 1) if ridge is None else ridge
    left = own + spare
    products = rows @ rows.mT if count <= WORTH * k else None
    basis = rows.new_zeros(images, k, count)
    taken = torch.zeros_like(own, dtype=torch.bool)
    order, gains = [], []
    for step in range(k):
        best = score(left.masked_fill(taken, float("nan"))).masked_fill(taken, float("-inf")).argmax(1, keepdim=True)
        gain = left.gather(1, best)
        order.append(best)
        gains.append(gain)
        taken = taken.scatter(1, best, True)
        with_best = (rows @ _one(rows, best).mT)[..., 0] if products is None else _one(products, best)[:, 0]
        known = basis[:, :step]
        explained = (known.mT @ _one(known.mT, best).mT)[..., 0]
        # A token without anything of its own tells nothing about the others, and must not be divided by.
        basis[:, step] = torch.where(gain > 0, gain, torch.inf).rsqrt() * (with_best - explained)
        left = left - basis[:, step].square()
        left = torch.where(left - spare < least, spare, left)
    return torch.cat(order, dim=1), torch.cat(gains, dim=1)


def _one(rows: Tensor, index: Tensor) -> Tensor:
    """Of ``[I, N, D]`` the row ``index`` ``[I, 1]`` of each: ``[I, 1, D]``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
