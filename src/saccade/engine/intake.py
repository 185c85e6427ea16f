"""From what the model was called with to the `Layout` of the forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from saccade.core.errors import SaccadeError
from saccade.core.layout import Item
from saccade.models.anatomy import Anatomy, Grid


@dataclass(frozen=True)
class Intake:
    """What a call of the multimodal model says about its rows, on the host.

    Attributes:
        visual: ``[B, q]`` placeholder rows.
        valid: ``[B, q]`` rows that are not padding.
        items: images of each sample.
    """

    visual: Tensor
    valid: Tensor
    items: tuple[tuple[Item, ...], ...]

    @classmethod
    def plain(cls, batch: int, rows: int) -> Intake:
        """Text only, nothing padded."""
        return cls(torch.zeros(batch, rows, dtype=torch.bool), torch.ones(batch, rows, dtype=torch.bool), ((),) * batch)

    @classmethod
    def read(cls, anatomy: Anatomy, kwargs: Mapping[str, Any], grids: Sequence[Grid]) -> Intake:
        """From the keyword arguments of the multimodal model and the grids that the vision tower saw last."""
        ids = kwargs.get("input_ids")
        if ids is None:
            raise SaccadeError("inputs_embeds: a prompt under a recipe needs input_ids (they say which rows are visual)")
        batch, rows = ids.shape
        if rows == 1:
            return cls.plain(batch, rows)
        visual = torch.isin(ids.cpu(), torch.tensor(anatomy.image_tokens))
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2
        valid = mask[:, -rows:].bool().cpu() if padded else torch.ones_like(visual)
        return cls(visual, valid, _items(visual.sum(1).tolist(), grids))

    @property
    def tail(self) -> Tensor | None:
        """``[B]`` one past each sample's last row that is not padding, or None where all end at the last row."""
        if bool(self.valid[:, -1].all()):
            return None
        return (self.valid * torch.arange(1, self.valid.shape[1] + 1)).amax(1)


def _items(counts: Sequence[int], grids: Sequence[Grid]) -> tuple[tuple[Item, ...], ...]:
    """Deal the encoded images out to the samples; ``generate`` may have repeated each sample (beams, several answers)."""
    total, encoded = sum(counts), sum(rows * columns for rows, columns in grids)
    if total == 0:
        return ((),) * len(counts)
    if encoded == 0:  # features that were encoded outside of this session: the grid is not known
        return tuple((Item(1, count, 0),) if count else () for count in counts)
    repeats = total // encoded
    if total % encoded or len(counts) % repeats:
        raise _mismatch(total, encoded)
    items: list[tuple[Item, ...]] = []
    source = 0
    for count in counts[::repeats]:
        mine = []
        while count > 0 and source < len(grids):
            mine.append(Item(*grids[source], source))
            count -= mine[-1].count
            source += 1
        if count:
            raise _mismatch(total, encoded)
        items += [tuple(mine)] * repeats
    return tuple(items)


def _mismatch(total: int, encoded: int) -> SaccadeError:
    return SaccadeError(
        f"input_ids: {total} image placeholders for {encoded} encoded visual tokens; pass every image's placeholders in "
        "one forward (prefill_chunk_size=None)"
    )
