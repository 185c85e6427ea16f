"""How far a model's answer moves."""

from __future__ import annotations

from torch import Tensor


def divergence(original: Tensor, modified: Tensor) -> Tensor:
    """``KL(softmax(modified) || softmax(original))`` over the vocabulary: logits ``[..., V]`` to nats ``[...]``."""
    p, q = modified.double().log_softmax(-1), original.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)
