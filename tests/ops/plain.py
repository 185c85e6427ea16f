"""Attention in the plainest way, for stores to be held against."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(
    query: Tensor, early: tuple[Tensor, Tensor], late: tuple[Tensor, Tensor], visible: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, probabilities, and the log-sum-exp of the logits over the early entries alone."""
    group = query.shape[1] // early[0].shape[1]
    keys, values = (torch.cat([a, b], dim=2).repeat_interleave(group, dim=1) for a, b in zip(early, late))
    logits = (query @ keys.mT * scale).masked_fill(~visible, float("-inf"))
    probabilities = logits.softmax(-1)
    return probabilities @ values, probabilities, logits[..., : early[0].shape[2]].logsumexp(-1)
