"""Choosing the best entries, with the tie rule that every card states: the lowest index wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.ranking import ranked


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices ``[..., k]`` of the largest ``scores`` ``[..., n]``, best first; among equals the lowest index first."""
    return ranked(scores).sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top_rows(scores: Tensor, candidates: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask ``[B, N]`` of the ``counts[b]`` best-scored ``candidates`` ``[B, N]`` (bool) of each sample."""
    # A candidate scored -inf still goes before what is no candidate.
    finite = ranked(scores).clamp(min=torch.finfo(scores.dtype).min)
    order = finite.masked_fill(~candidates, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    best = rank < upload(counts, scores.device)[:, None]
    return torch.zeros_like(candidates).scatter(1, order, best) & candidates


def top_of_groups(scores: Tensor, group: Tensor, counts: Sequence[Sequence[int]]) -> Tensor:
    """Mask ``[B, N]`` of the ``counts[b][g]`` best-scored rows of each ``group`` g ``[B, N]``; group -1 is left out."""
    best = ranked(scores).sort(dim=1, descending=True, stable=True).indices
    grouped, order = group.gather(1, best).sort(dim=1, stable=True)
    rank = torch.arange(scores.shape[1], device=scores.device) - torch.searchsorted(grouped, grouped)
    most = max(map(len, counts), default=0)
    limits = upload([[0, *of, *[0] * (most - len(of))] for of in counts], scores.device)
    chosen = rank < limits.gather(1, grouped + 1)
    return torch.zeros_like(chosen).scatter(1, best.gather(1, order), chosen)
