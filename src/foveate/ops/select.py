"""Choosing the best entries, with the tie rule that every card states: the lowest index wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.ranking import ranked

SHORT = 4096
"""So many scores are sorted whole sooner than their keys are made."""


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices ``[..., k]`` of the largest ``scores`` ``[..., n]``, best first; among equals the lowest index first.

    All n where k is more. nan goes before everything, -0.0 is 0.0.
    """
    return _best(ranked(scores), k)


def top_rows(scores: Tensor, candidates: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask ``[B, N]`` of the ``counts[b]`` best-scored ``candidates`` ``[B, N]`` (bool) of each sample."""
    # A candidate scored -inf still goes before what is no candidate.
    finite = ranked(scores).clamp(min=torch.finfo(scores.dtype).min)
    best = _best(finite.masked_fill(~candidates, float("-inf")), max(counts, default=0))
    rank = torch.arange(best.shape[1], device=scores.device).expand_as(best)
    chosen = rank < upload(counts, scores.device)[:, None]
    return torch.zeros_like(candidates).scatter(1, best, chosen) & candidates


def first_rows(order: Tensor, rows: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """Mask ``[B, width]`` of the first ``counts[b]`` of ``rows`` ``[B, n]`` in the ``order`` ``[B, k]`` of their choice."""
    rank = torch.arange(order.shape[1], device=order.device).expand_as(order)
    chosen = rank < upload(counts, order.device)[:, None]
    # What stands behind a sample's count may be anything, also a row that was chosen: it must not take that back.
    spare = rows.gather(1, order).masked_fill(~chosen, width)
    mask = torch.zeros(len(order), width + 1, dtype=torch.bool, device=order.device)
    return mask.scatter(1, spare, True)[:, :width]


def _best(scores: Tensor, k: int) -> Tensor:
    """`top_k` without showing what is ranked."""
    count = scores.shape[-1]
    if scores.numel() <= SHORT or k >= count or scores.dtype.itemsize > 4:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # A partial sort knows no order of equals, so none are equal: below the score the key counts places backwards.
    behind = torch.arange(count - 1, -1, -1, device=scores.device)
    return _ordinal(scores.detach()).long().bitwise_left_shift_(32).add_(behind).topk(k).indices


def _ordinal(scores: Tensor) -> Tensor:
    """Integers of 32 bits at most in the order of ``scores``, equal where these are; a nan is the largest."""
    if not scores.is_floating_point():
        return scores
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    # A float's bits count up with its magnitude: below zero they are turned round.
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).masked_fill_(scores.isnan(), 0x7FFFFFFF)


def top_of_groups(scores: Tensor, group: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Mask ``[B, N]`` of the ``counts[b][g]`` best-scored rows of each ``group`` g ``[B, N]``; group -1 is left out."""
    best = ranked(scores).sort(dim=1, descending=True, stable=True).indices
    grouped, order = group.gather(1, best).sort(dim=1, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device) - torch.searchsorted(grouped, grouped)
    most = max(map(len, counts), default=0)
    limits = upload([[0, *of, *[0] * (most - len(of))] for of in counts], scores.device)
    chosen = rank < limits.gather(1, grouped + 1)
    return torch.zeros_like(chosen).scatter(1, best.gather(1, order), chosen)
