"""Subsets that lie far from each other: farthest-first traversal (greedy k-center)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foveate.core.ranking import about, ranked
from foveate.ops.select import first_rows

Metric = Literal["cosine", "euclidean", "manhattan"]
WORTH = 10
"""Distances to one token made by themselves take as long as so many in one product."""
FAR = torch.finfo(torch.float32).max
"""Distance to nothing: a weight of 0 makes 0 of it."""
BLOCK = 256
"""Tokens whose distances to all others are held at a time."""


@torch.no_grad()
def farthest_first(
    points: Tensor,
    k: int,
    first: Tensor | None = None,
    weight: Tensor | None = None,
    metric: Metric = "cosine",
    valid: Tensor | None = None,
    taken: Tensor | None = None,
) -> Tensor:
    """Each step takes the token with the largest ``weight * min_{s in S} d(i, s)``; of equals the one with the lowest index.

    Tokens that are taken are never taken again: copies of them come last, but they come. Steps follow each other, images run
    side by side. Holds ``I * N`` floats beside the points, ``I * N * N`` where ten k are N or more: then one product of all
    is faster.

    Args:
        points: ``[I, N, D]``.
        k: tokens to choose.
        first: ``[I]`` the token to begin with; None = the most isolated one (see `isolation`).
        weight: ``[I, N]``, not negative; None = 1. The first token is not weighed.
        metric: ``1 - cos`` (a zero vector is at distance 1 from all), or the Euclidean or Manhattan distance.
        valid: ``[I, N]`` tokens that may be chosen; None = all.
        taken: ``[I, N]`` tokens that were chosen before, from which it goes on (``first`` is not asked then); an image
            without any begins at its first valid token.

    Returns:
        ``[I, k]`` indices in the order of choice, so that the first n of them are the choice for n. Where an image has fewer
        valid tokens than k, what comes behind them means nothing.
    """
    points = points.float()
    if metric == "cosine":
        points = torch.nn.functional.normalize(points, dim=-1)
    out = torch.zeros(points.shape[:2], dtype=torch.bool, device=points.device) if valid is None else ~valid
    every = distances(points, points, metric) if points.shape[1] <= WORTH * k else None
    if taken is None:
        chosen = (isolation(points, out, metric, every).argmax(1) if first is None else first)[:, None]
        nearest = torch.full_like(points[..., 0], FAR)
    else:
        out, nearest = out | taken, _nearest(points, ~taken, metric, every)
        chosen = _farthest(nearest, weight, out)
    order = [chosen]
    for _ in range(k - 1):
        row = distances(_row(points, chosen), points, metric) if every is None else _row(every, chosen)
        nearest = nearest.minimum(row[:, 0])
        out = out.scatter(1, chosen, True)
        chosen = _farthest(nearest, weight, out)
        order.append(chosen)
    ranked(nearest if weight is None else nearest * weight)
    return torch.cat(order, dim=1)[:, :k]


def spread_out(x: Tensor, rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask ``[B, N]`` of ``counts[b]`` tokens far from each other.

    Args:
        x: ``[B, N, D]``.
        rows: ``[B, V]`` the candidates among them, -1 = padding.
        counts: tokens to choose of each sample.
    """
    index = rows.clamp(min=0)
    points = x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
    with about(torch.arange(len(x), device=x.device), index, (x.shape[0], x.shape[1])):
        order = farthest_first(points, max(counts, default=0), valid=rows >= 0)
    return first_rows(order, index, counts, x.shape[1])


def isolation(points: Tensor, out: Tensor, metric: Metric = "cosine", every: Tensor | None = None) -> Tensor:
    """``[I, N]`` distance of each of ``points`` ``[I, N, D]`` (unit, if cosine) to the nearest other.

    Those ``out`` ``[I, N]`` (bool) are nobody's neighbour, and at -inf themselves. ``every``: all distances ``[I, N, N]``,
    where they are known.
    """
    return _nearest(points, out, metric, every, others=True).masked_fill(out, float("-inf"))


def _nearest(points: Tensor, absent: Tensor, metric: Metric, every: Tensor | None, others: bool = False) -> Tensor:
    """``[I, N]`` distance of each point to the nearest (of ``others``, if so) that is not ``absent`` ``[I, N]``."""
    place, nearest = torch.arange(points.shape[1], device=points.device), []
    for start in range(0, points.shape[1], BLOCK):
        some = place[start : start + BLOCK]
        hidden = (some[:, None] == place) | absent[:, None] if others else absent[:, None]
        rows = distances(points[:, some], points, metric) if every is None else every[:, some]
        nearest.append(rows.masked_fill(hidden, FAR).amin(2))
    return torch.cat(nearest, dim=1)


def _farthest(nearest: Tensor, weight: Tensor | None, out: Tensor) -> Tensor:
    """``[I, 1]`` the token not ``out`` with the largest weighed distance."""
    score = nearest if weight is None else nearest * weight
    return score.masked_fill(out, float("-inf")).argmax(1, keepdim=True)


def distances(a: Tensor, b: Tensor, metric: Metric = "cosine") -> Tensor:
    """Distances ``[I, n, N]`` of ``a`` ``[I, n, D]`` to ``b`` ``[I, N, D]``, not negative; for the cosine they are unit."""
    if metric == "cosine":
        return (1 - a @ b.mT).clamp_(min=0)
    return torch.cdist(a, b, p=1 if metric == "manhattan" else 2)


def _row(rows: Tensor, index: Tensor) -> Tensor:
    """Of ``[I, N, D]`` the row ``index`` ``[I, 1]`` of each: ``[I, 1, D]``."""
    return rows.gather(1, index[..., None].expand(-1, -1, rows.shape[2]))
