"""What a method asks to see. The engine records exactly that, beside fused kernels, and nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from saccade.core.reduction import Reduction


@dataclass(frozen=True)
class Site:
    """A place in the model: ``encoder[i]`` (a block of the vision encoder), ``sequence`` (before the language model),
    ``decoder[i]`` (a layer of the language model).
    """

    kind: Literal["encoder", "sequence", "decoder"]
    layer: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "sequence" else f"{self.kind}[{self.layer}]"


@dataclass(frozen=True)
class Rows:
    """Attention rows at a site: of the encoder's CLS query, or of the last ``queries`` rows of each prompt.

    Delivered as `Attention`.
    """

    site: Site
    queries: Literal["cls"] | int = 1


@dataclass(frozen=True)
class Columns:
    """Attention received by each key at a site: the mean over heads and over the queries that can see the key.

    Streamed in chunks of queries, never as a full map. Delivered as ``[B, n]``, float32: at encoder sites one row for
    each image, CLS column dropped; at decoder sites one for each sample.
    """

    site: Site


@dataclass(frozen=True)
class Features:
    """What the projector is fed: encoder features of each image ``[I, n, D]``, CLS dropped."""


Signal = Rows | Columns | Features


@dataclass(frozen=True)
class Attention:
    """Rows of attention before the softmax, so that any card's softmax can be formed.

    Attributes:
        logits: ``[B, H, Q, K]`` float32, scaled, masked keys at -inf. K counts the keys of the current rows.
        lse: ``[B, H, Q]`` log-sum-exp over *all* keys, also those of earlier turns.
    """

    logits: Tensor
    lse: Tensor

    def probabilities(self) -> Tensor:
        """``[B, H, Q, K]`` softmax over all keys."""
        return (self.logits - self.lse[..., None]).exp()

    def __getitem__(self, batch: Tensor) -> Attention:
        """The rows of some entries of the batch."""
        return Attention(self.logits[batch], self.lse[batch])

    def after(self, reduction: Reduction) -> Attention:
        """The same rows over the keys that live on after an edit of the sequence."""
        keys = self.logits.permute(0, 3, 1, 2)
        kept = reduction.take(keys).masked_fill(~reduction.valid[..., None, None], float("-inf"))
        return Attention(kept.permute(0, 2, 3, 1), self.lse)


Seen = Mapping[Signal, Any]
"""What was recorded, by the signal that asked for it."""
