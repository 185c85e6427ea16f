"""Runs experts on the (row, expert) pairs that survive, under whatever implementation the model chose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Forward = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rows ``[T, D]``, chosen experts ``[T, K]`` and their weights ``[T, K]`` to rows ``[T, D]``."""


def surviving(experts: Forward, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
    """What ``experts`` makes of ``x``; pairs of weight 0 cost nothing. Waits for the device once."""
    pairs = weights.flatten().nonzero()[:, 0]
    if len(pairs) == weights.numel():
        return experts(x, index, weights)
    if not len(pairs):
        return torch.zeros_like(x)
    chosen = weights.shape[1]
    # Each pair as a row with a single expert. Not index_add: on a GPU its order of summation is left to chance.
    made = experts(x[pairs // chosen], index.flatten()[pairs, None], weights.flatten()[pairs, None])
    return made.new_zeros(weights.numel(), x.shape[1]).index_copy(0, pairs, made).unflatten(0, (-1, chosen)).sum(1)


def weighed(
    weigh: Callable[[Tensor, Tensor], Tensor],
    echo: bool,
    original: Forward,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Run experts, whose ``original`` forward this is, with what ``weigh`` makes of ``[T, K]`` experts and weights.

    ``echo``: a row without any gets itself back, not zeros.
    """
    weights = weigh(top_k_index, top_k_weights)
    made = surviving(original, hidden_states, top_k_index, weights)
    return made.where(weights.any(1, keepdim=True), hidden_states) if echo else made
