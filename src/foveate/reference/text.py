"""The text tower of the reference model, for methods that compare the question with the picture."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .model import END, SPECIAL, TOKEN_IDS, TextTower


class ReferenceCompanion:
    """A `foveate.core.companion.Companion`: `foveate.ClipCompanion` for a text tower that shares the model's vocabulary."""

    def __init__(self, tower: TextTower, norm: nn.Module) -> None:
        """``norm`` is the one behind the vision tower."""
        self._tower, self._norm = tower, norm

    @torch.no_grad()
    def question(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Text embeddings ``[M, d]`` of each sample's M segments, given its token ids ``[n]``, special ones left out."""
        words = [[*row[row >= len(SPECIAL)].tolist(), TOKEN_IDS[END]] for row in ids]
        length = self._tower.text.config.max_position_embeddings
        segments = [torch.tensor(row + [0] * (-len(row) % length)).view(-1, length) for row in words]
        embeds: Tensor = self._tower.text(input_ids=torch.cat(segments).to(self._tower.text.device)).text_embeds
        return list(embeds.split(list(map(len, segments))))

    @torch.no_grad()
    def align(self, features: Tensor) -> Tensor:
        """Encoder features ``[I, n, D]`` in the same space: ``[I, n, d]``."""
        aligned: Tensor = self._tower.visual_projection(self._norm(features))
        return aligned
