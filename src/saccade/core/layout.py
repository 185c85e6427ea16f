"""The ledger of what is alive: one row for each live position of the language model's sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from saccade.core.reduction import Reduction


class Role(IntEnum):
    """What a row of the sequence is."""

    PAD = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3


VISUAL = (Role.IMAGE, Role.VIDEO)


@dataclass(frozen=True)
class Item:
    """One image or video of a sample, as the language model sees it: ``rows * columns`` tokens in raster order.

    ``source`` is its number in the encoder's batch.
    """

    rows: int
    columns: int
    source: int

    @property
    def count(self) -> int:
        """Visual tokens of the item before anything was dropped."""
        return self.rows * self.columns


@dataclass(frozen=True)
class Edit:
    """A `Reduction` and what a linear map cannot say.

    Attributes:
        reduction: maps the site's rows to the rows that go on.
        positions: rotary positions of the rows that go on: ``"anchor"`` keeps the anchors' own, ``"contiguous"`` renumbers
            them without gaps (later text follows), a tensor ``[R, B, k]`` sets them.
        values: ``[B, k, D]`` replaces what the reduction makes of the hidden states (a result that is not linear).
        live: rows that go on in each sample, padding not counted, where the method knows them (saves a host sync).
        visual: the same for visual rows.
    """

    reduction: Reduction
    positions: Literal["anchor", "contiguous"] | Tensor = "anchor"
    values: Tensor | None = None
    live: tuple[int, ...] | None = None
    visual: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """One row for each live position, ``[B, N]``, immutable; every `Edit` makes a new one.

    Attributes:
        origin: index in the forward's own full sequence; -1 = padding made by a ragged edit.
        role: a `Role` for each row.
        item: number of the image within its sample, -1 where none.
        ordinal: index among the item's original tokens in raster order, -1 where none.
        positions: ``[R, B, N]`` rotary positions; R = 1, 3 or 4 as the model family has it.
        size: how many original rows a row stands for.
        items: the images of each sample, as they were.
        live: rows that are not padding, of each sample (on the host).
        visual: visual rows of each sample (on the host).
    """

    origin: Tensor
    role: Tensor
    item: Tensor
    ordinal: Tensor
    positions: Tensor
    size: Tensor
    items: tuple[tuple[Item, ...], ...]
    live: tuple[int, ...]
    visual: tuple[int, ...]

    @classmethod
    def build(cls, visual: Tensor, valid: Tensor, positions: Tensor, items: Sequence[Sequence[Item]]) -> Layout:
        """The layout of an unedited sequence.

        Args:
            visual: ``[B, N]`` bool on the host (CPU): placeholder rows. The k-th one of a sample is the k-th visual token.
            valid: ``[B, N]`` bool on the host (CPU): rows that are not padding.
            positions: ``[R, B, N]`` on the device that the layout is to live on.
            items: images of each sample in order; their counts add up to the sample's placeholders.
        """
        device = positions.device
        nth = visual.long().cumsum(1) - 1
        item, ordinal = torch.full_like(nth, -1), torch.full_like(nth, -1)
        for sample, images in enumerate(items):
            counts = torch.tensor([image.count for image in images], dtype=torch.long)
            if len(counts):
                where = visual[sample]
                item[sample, where] = torch.arange(len(counts)).repeat_interleave(counts)
                ordinal[sample, where] = nth[sample, where] - (counts.cumsum(0) - counts)[item[sample, where]]
        role = torch.where(visual, int(Role.IMAGE), int(Role.TEXT)).masked_fill(~valid, int(Role.PAD))
        origin = torch.arange(visual.shape[1]).expand_as(nth)
        return cls(
            origin=origin.to(device),
            role=role.to(device),
            item=item.to(device),
            ordinal=ordinal.to(device),
            positions=positions,
            size=valid.float().to(device),
            items=tuple(tuple(images) for images in items),
            live=tuple(valid.sum(1).tolist()),
            visual=tuple(visual.sum(1).tolist()),
        )

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, N)``."""
        return self.origin.shape[0], self.origin.shape[1]

    @property
    def valid(self) -> Tensor:
        """``[B, N]`` rows that are not padding."""
        return self.role != Role.PAD

    @property
    def dense(self) -> bool:
        """Whether no row is padding."""
        return all(count == self.shape[1] for count in self.live)

    @property
    def yx(self) -> Tensor:
        """``[B, N, 2]`` cell of each visual row in its item's grid, -1 elsewhere."""
        widest = max((len(images) for images in self.items), default=0)
        columns = [[image.columns for image in images] + [1] * (widest - len(images) + 1) for images in self.items]
        width = torch.tensor(columns, device=self.item.device).gather(1, self.item.clamp(min=0))
        cell = torch.stack([self.ordinal.div(width, rounding_mode="floor"), self.ordinal % width], dim=-1)
        return cell.masked_fill((self.ordinal < 0)[..., None], -1)

    def rows(self, *roles: Role, item: int | None = None) -> Tensor:
        """``[B, N]`` bool: rows of the given roles (and, if given, of one item)."""
        chosen = torch.zeros_like(self.role, dtype=torch.bool)
        for role in roles:
            chosen |= self.role == role
        return chosen if item is None else chosen & (self.item == item)

    def after(self, edit: Edit) -> Layout:
        """The layout once ``edit`` was applied."""
        reduction = edit.reduction
        pad = ~reduction.valid

        def follow(ids: Tensor, padding: int) -> Tensor:
            return reduction.take(ids).masked_fill(pad, padding)

        role = follow(self.role, int(Role.PAD))
        edited = replace(
            self,
            origin=follow(self.origin, -1),
            role=role,
            item=follow(self.item, -1),
            ordinal=follow(self.ordinal, -1),
            positions=self._positions(edit, role != Role.PAD),
            size=reduction.mass(self.size),
            live=edit.live or (),
            visual=edit.visual or (),
        )
        if edit.live is None:
            edited = replace(edited, live=tuple(edited.valid.sum(1).tolist()))
        if edit.visual is None:
            edited = replace(edited, visual=tuple(edited.rows(*VISUAL).sum(1).tolist()))
        return edited

    def ordinals(self) -> list[list[Tensor]]:
        """Original raster indices of the visual rows alive, for each sample and each of its items (on the host)."""
        item, ordinal = self.item.cpu(), self.ordinal.cpu()
        return [
            [ordinal[sample][item[sample] == number] for number in range(len(images))]
            for sample, images in enumerate(self.items)
        ]

    def _positions(self, edit: Edit, valid: Tensor) -> Tensor:
        if isinstance(edit.positions, Tensor):
            return edit.positions
        kept = torch.stack([edit.reduction.take(row) for row in self.positions])
        if edit.positions == "anchor":
            return kept
        before = self.valid
        first = self.positions.masked_fill(~before, torch.iinfo(self.positions.dtype).max).amin(dim=2, keepdim=True)
        rank = (valid.long().cumsum(1) - 1).clamp(min=0)
        return (first + rank).masked_fill(~valid, 0)
