"""A second model beside the first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Companion(Protocol):
    """A text tower beside the model, for methods that compare the question with the picture."""

    def question(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings ``[M, d]`` of each sample's question, given its token ids ``[n]`` in the model's own vocabulary."""

    def align(self, features: Tensor) -> Tensor:
        """Encoder features ``[I, n, D]`` in the same space: ``[I, n, d]``."""
