"""Subsets that cover the rest: facility location."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from foveate.core.ranking import ranked

Combine = Literal["multiply", "add"]
AHEAD = 16
"""Tokens whose scores are renewed at a time on a CPU."""
CPU_BLOCK, BLOCK = 128, 1024
"""Tokens whose scores are made at a time where all are: few stay in a CPU's cache, another device wants few calls."""


@torch.no_grad()
def greedy_cover(features: Tensor, saliency: Tensor, k: int, alpha: float = 1.0, combine: Combine = "multiply") -> Tensor:
    """Saliency-weighted facility location.

    Each step takes the token with the largest ``gain * saliency ** alpha`` (or ``gain + saliency ** alpha``), where the
    gain is the rise of ``sum_u max_{s in S} cos(u, s)`` over all tokens u; of equals the one with the lowest index. Takes
    ``N * N`` floats, for each image at once unless on a CPU.

    Args:
        features: ``[I, N, D]``.
        saliency: ``[I, N]``, not negative.
        k: budget.
        alpha: exponent of the saliency.
        combine: how gain and saliency meet.

    Returns:
        ``[I, k]`` indices in the order of selection.
    """
    unit = torch.nn.functional.normalize(features.float(), dim=-1, eps=1e-8)
    weight = ranked(saliency.float()) ** alpha
    if unit.device.type == "cpu":
        return torch.stack([lazily(one @ one.T, own, k, combine) for one, own in zip(unit, weight)])
    return all_at_once(unit @ unit.mT, weight, k, combine)


def lazily(similarity: Tensor, weight: Tensor, k: int, combine: Combine) -> Tensor:
    """Indices ``[k]`` for one image with ``similarity`` ``[N, N]`` and ``weight`` ``[N]``, hardly a score made twice.

    What is covered only grows, so a score of an earlier step is never below today's, not in float32 either: it rounds the
    same sum of numbers that were no smaller. Hence the best of all scores, old or new, is right once it is new itself. For
    that it has to be read at every step, which costs nothing on a CPU and a wait elsewhere.
    """
    covered = torch.zeros_like(weight)
    scores = _all_scores(similarity, weight, covered, combine, CPU_BLOCK)
    order: list[int] = []
    for _ in range(k):
        new = torch.zeros_like(scores, dtype=torch.bool)
        while not new[best := int(scores.argmax())]:
            some = scores.masked_fill(new, float("-inf")).topk(min(AHEAD, len(scores))).indices
            # The smaller one, as a token that is taken stays at -inf.
            scores[some] = scores[some].minimum(_scores(similarity[some], weight[some], covered, combine))
            new[some] = True
        order.append(best)
        scores[best] = float("-inf")
        covered = covered.maximum(similarity[best])
    return torch.tensor(order, dtype=torch.long)


def all_at_once(similarity: Tensor, weight: Tensor, k: int, combine: Combine) -> Tensor:
    """Indices ``[I, k]`` for ``similarity`` ``[I, N, N]`` and ``weight`` ``[I, N]``, every score made at every step."""
    image = torch.arange(len(weight), device=weight.device)
    covered = torch.zeros_like(weight)
    taken = torch.zeros_like(weight, dtype=torch.bool)
    order = []
    for _ in range(k):
        scores = _all_scores(similarity, weight, covered, combine, BLOCK)
        best = scores.masked_fill_(taken, float("-inf")).argmax(1)
        order.append(best)
        taken[image, best] = True
        covered = covered.maximum(similarity[image, best])
    return torch.stack(order, dim=1)


def _all_scores(similarity: Tensor, weight: Tensor, covered: Tensor, combine: Combine, block: int) -> Tensor:
    """``[..., N]`` scores of all tokens, made for about ``block`` of them at a time."""
    blocks = -(-weight.shape[-1] // block)
    parts = zip(similarity.chunk(blocks, dim=-2), weight.chunk(blocks, dim=-1))
    return torch.cat([_scores(rows, own, covered, combine) for rows, own in parts], dim=-1)


def _scores(rows: Tensor, weight: Tensor, covered: Tensor, combine: Combine) -> Tensor:
    """``[..., n]`` scores of tokens with similarities ``rows`` ``[..., n, N]`` and ``weight`` ``[..., n]``."""
    # similarity is symmetric: row v holds cos(v, u) for all u, so summing rows reads memory in order
    gain = (rows - covered[..., None, :]).clamp_(min=0).sum(-1)
    return gain * weight if combine == "multiply" else gain + weight
