"""Choosing the best entries, with the tie rule that every card states: the lowest index wins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def top_k(scores: Tensor, k: int) -> Tensor:
    """Indices ``[..., k]`` of the largest ``scores`` ``[..., n]``, best first; among equals the lowest index first."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def top_rows(scores: Tensor, candidates: Tensor, counts: Sequence[int]) -> Tensor:
    """Mask ``[B, N]`` of the ``counts[b]`` best-scored ``candidates`` ``[B, N]`` (bool) of each sample."""
    # A candidate scored -inf still goes before what is no candidate.
    finite = scores.clamp(min=torch.finfo(scores.dtype).min)
    order = finite.masked_fill(~candidates, float("-inf")).sort(dim=1, descending=True, stable=True).indices
    rank = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    best = rank < torch.tensor(counts, device=scores.device)[:, None]
    return torch.zeros_like(candidates).scatter(1, order, best) & candidates
