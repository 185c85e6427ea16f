"""Bipartite soft matching (ToMe): every second token may join its most similar partner among the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.ranking import ranked
from foveate.core.reduction import Reduction
from foveate.core.shape import INDEX, Shape

Order = Literal["grouped", "similarity", "raster"]


def bipartite(
    metric: Tensor,
    r: Sequence[int],
    live: Sequence[int],
    *,
    valid: Tensor | None = None,
    protected: int = 0,
    penalty: Tensor | None = None,
    order: Order = "grouped",
) -> tuple[Tensor, Tensor]:
    """Merge the ``r[b]`` rows at even places that are most like a row at an odd place into that row.

    Several rows may join the same one; a row that others join never moves. Where ``r[b]`` is 0 nothing happens at all.

    Args:
        metric: ``[B, n, d]`` what similarity (cosine) is measured on; n of 2 or more.
        r: rows to remove of each sample, at most half of those that are not protected.
        live: rows of each sample that are not padding.
        valid: ``[B, n]`` bool, which rows these are; None = the first ``live[b]``. Places are counted over them alone.
        protected: leading rows (CLS) that neither move nor are joined.
        penalty: ``[B, n]`` subtracted from a row's similarities before it is ranked, as a row that moves.
        order: of the output: surviving even rows, then odd rows (``"grouped"``), the former by descending similarity
            (``"similarity"``), or all as they stood (``"raster"``). Protected rows stay first.

    Returns:
        Output row that each row goes to ``[B, n]`` (-1 = padding), and the row whose place each output row takes ``[B, k]``,
        k = max(live - r), with -1 as padding at the end.
    """
    rows, device = metric.shape[1], metric.device
    front = None
    if valid is not None and any(count < rows for count in live):
        front = valid.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices
        metric = metric.gather(1, front[..., None].expand_as(metric))
        penalty = None if penalty is None else penalty.gather(1, front)
    removed, alive = (upload(tuple(counts), device)[:, None] for counts in (r, live))
    place = torch.arange(rows, device=device)
    padding = place >= alive

    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if penalty is not None:
        scores = scores - penalty[:, ::2, None]
    scores = scores.masked_fill(padding[:, None, 1::2] | (place[1::2] < protected), float("-inf"))
    best, partner = scores.max(-1)
    best = best.masked_fill(padding[:, ::2] | (place[::2] < protected), float("-inf"))
    even = (place if front is None else front)[..., ::2].expand_as(best)
    ranking = ranked(best, even, rows).sort(dim=1, descending=True, stable=True).indices
    rank = torch.zeros_like(ranking).scatter(1, ranking, place[: ranking.shape[1]].expand_as(ranking))
    moves = rank < removed

    key = place.expand_as(padding).clone()
    if order != "raster":
        key[:, 1::2] += rows
        if order == "similarity":
            key[:, ::2] = rank
        key[:, :protected] = place[:protected] - protected
        key = torch.where(removed > 0, key, place)
    key[:, ::2].masked_fill_(moves, 3 * rows)
    ordered = key.masked_fill(padding, 3 * rows).sort(dim=1, stable=True).indices
    slot = torch.zeros_like(ordered).scatter(1, ordered, place.expand_as(ordered))
    target = place.expand_as(padding).clone()
    target[:, ::2] = torch.where(moves, 2 * partner + 1, place[::2])
    assignment = slot.gather(1, target).masked_fill(padding, -1)

    width = max(count - gone for count, gone in zip(live, r))
    anchor = ordered[:, :width]
    if front is not None:
        anchor, assignment = front.gather(1, anchor), torch.zeros_like(assignment).scatter(1, front, assignment)
    return assignment, anchor.masked_fill(place[:width] >= alive - removed, -1)


def averaging(assignment: Tensor, anchor: Tensor, size: Tensor) -> Reduction:
    """The mean of the rows that go to each output row, weighted by ``size`` ``[B, n]``.

    ``assignment`` ``[B, n]`` and ``anchor`` ``[B, k]`` are those of `bipartite`.
    """
    goes = assignment.clamp(min=0)
    own = size.masked_fill(assignment < 0, 0)
    total = own.new_zeros(anchor.shape).scatter_add(1, goes, own)
    return Reduction.merging(assignment, own / total.gather(1, goes).clamp(min=torch.finfo(own.dtype).tiny), anchor)


def matching_bytes(shape: Shape) -> int:
    """Most bytes of a matching of the encoder's rows, by the keys of a block, and of their merge."""
    similarities = 3 * shape.images * shape.image_rows**2
    numbers = 32 * shape.images * shape.image_rows * INDEX
    return similarities + numbers + 4 * shape.features + 4 * shape.floats(shape.features)


def joining(target: Tensor, weight: Tensor, live: Sequence[int]) -> Reduction:
    """Rows that go to others as a `Reduction`: those that go to themselves stay, in their order.

    Args:
        target: ``[B, N]`` the row that each row goes to, -1 = padding.
        weight: ``[B, N]`` its share of the sum.
        live: rows that stay of each sample.
    """
    place = torch.arange(target.shape[1], device=target.device)
    anchor = Reduction.keeping(target == place, tuple(live)).anchor
    slot = torch.full((len(target), target.shape[1] + 1), -1, device=target.device)
    rank = torch.arange(anchor.shape[1], device=target.device).expand_as(anchor)
    slot = slot.scatter(1, torch.where(anchor < 0, target.shape[1], anchor), rank)
    return Reduction.merging(slot.gather(1, target.clamp(min=0)).masked_fill(target < 0, -1), weight, anchor)


def greedy_pairs(a: Tensor, b: Tensor, scores: Tensor, count: int) -> Tensor:
    """Which pairs one takes who always takes the best that is left; nobody is in two of them. On the host.

    A pair that is the best of both its partners is taken in any case: all such pairs are taken at once, until none is left.

    Args:
        a, b: ``[E]`` partners, numbered from 0.
        scores: ``[E]`` of the pairs; among equals the first goes first.
        count: how many partners there are.

    Returns:
        ``[E]`` bool.
    """
    rank = torch.empty_like(a).scatter(0, scores.sort(descending=True, stable=True).indices, torch.arange(len(a)))
    taken, left = torch.zeros(len(a), dtype=torch.bool), torch.ones(len(a), dtype=torch.bool)
    while bool(left.any()):
        open_rank = rank.masked_fill(~left, len(a))
        best = torch.full((count,), len(a)).scatter_reduce(0, a, open_rank, "amin").scatter_reduce(0, b, open_rank, "amin")
        now = left & (rank == best[a]) & (rank == best[b])
        used = torch.zeros(count, dtype=torch.bool).index_fill(0, torch.cat([a[now], b[now]]), True)
        taken, left = taken | now, left & ~used[a] & ~used[b]
    return taken
