"""The ledger of what is alive: one row for each live position of the language model's sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from foveate.core.reduction import Reduction


class Role(IntEnum):
    """What a row of the sequence is."""

    PAD = 0
    TEXT = 1
    IMAGE = 2
    VIDEO = 3
    NEWLINE = 4
    """A learned row that ends a line of visual tokens (LLaVA-NeXT): placeholder in the prompt, but no visual token."""
    CLS = 5
    """Summary rows of an encoder, before the first patch; at vision sites only."""
    ANSWER = 6
    """Text behind the prompt: an answer that is given to be learned or measured, or was generated without a cache."""


VISUAL = (Role.IMAGE, Role.VIDEO)


@dataclass(frozen=True)
class Item:
    """One grid of visual tokens of a sample, as the language model sees it: ``rows * columns`` tokens in raster order.

    A picture, or one view of it where a family shows an overview and details; the frames of a video lie one below the other.

    Attributes:
        rows, columns: the grid.
        source: number of the grid among all that the encoder was shown.
        frames: frames of a video, one for an image.
    """

    rows: int
    columns: int
    source: int
    frames: int = 1

    @property
    def count(self) -> int:
        """Visual tokens of the item before anything was dropped."""
        return self.rows * self.columns


Positions = Literal["auto", "anchor", "contiguous", "rank"]


@dataclass(frozen=True)
class Edit:
    """A `Reduction` and what a linear map cannot say.

    Attributes:
        reduction: maps the site's rows to the rows that go on. Text rows stay, in their order.
        positions: rotary positions of the rows that go on: ``"anchor"`` keeps the anchors' own, ``"contiguous"`` renumbers
            them without gaps (later text follows), ``"rank"`` does so for each axis of each item, as if the grid had been
            smaller, ``"auto"`` is contiguous where positions are one row and anchor under M-RoPE. A tensor ``[R, B, k]``
            sets them; R may be a multiple K of the model's own rows, the K-th part of each axis' frequencies then turns
            by the K-th row of that axis (see `foveate.methods.before_llm.ppe`).
        text_after: with ``"anchor"``, text behind an item keeps its positions, or follows the largest one kept.
        values: ``[B, k, D]`` replaces what the reduction makes of the hidden states (a result that is not linear).
        key_bias: ``[B, k]`` added to the attention logits of the rows as keys, from here on; at encoder sites only.
        all_layers: whether the rows that go are cut from the caches of earlier layers, too; at decoder sites only.
        live: rows that go on in each sample, padding not counted, where the method knows them (saves a host sync).
        visual: the same for visual rows.
    """

    reduction: Reduction
    positions: Positions | Tensor = "anchor"
    text_after: Literal["keep", "follow"] = "keep"
    values: Tensor | None = None
    key_bias: Tensor | None = None
    all_layers: bool = False
    live: tuple[int, ...] | None = None
    visual: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Layout:
    """One row for each live position, ``[B, N]``, immutable; every `Edit` makes a new one.

    Attributes:
        origin: index in the forward's own full sequence, ascending; -1 = padding made by a ragged edit. Where an edit
            changes the order of rows, the anchors' places are dealt out in order: attention is causal in row order.
        role: a `Role` for each row.
        item: number of the image within its sample, -1 where none.
        ordinal: index among the item's original tokens in raster order, -1 where none.
        positions: ``[R, B, N]`` rotary positions; R = 1, 3 or 4 as the model family has it.
        size: how many original rows a row stands for.
        items: the images of each sample, as they were.
        live: rows that are not padding, of each sample (on the host).
        visual: visual rows of each sample (on the host).
        answers: rows of each sample's answer (on the host), () = none anywhere. No method may look at them.
        pinned: 1 for each sample whose prompt ends in a visual row, 0 for the others (on the host), () = none anywhere. That
            row predicts the next token, so it lives through all layers, whatever a method chooses.
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
    answers: tuple[int, ...] = ()
    pinned: tuple[int, ...] = ()

    @classmethod
    def build(
        cls,
        visual: Tensor,
        valid: Tensor,
        positions: Tensor,
        items: Sequence[Sequence[Item]],
        *,
        placement: tuple[Tensor, Tensor] | None = None,
        newline: Tensor | None = None,
        video: Tensor | None = None,
        answer: Tensor | None = None,
    ) -> Layout:
        """The layout of an unedited sequence.

        Args:
            visual: ``[B, N]`` bool on the host (CPU), as all masks here: rows that are visual tokens.
            valid: ``[B, N]`` bool: rows that are not padding.
            positions: ``[R, B, N]`` on the device that the layout is to live on.
            items: grids of each sample in order; their counts add up to the sample's visual rows.
            placement: item and ordinal of each row, ``[B, N]`` each; None: the k-th visual row of a sample is token k.
            newline: ``[B, N]`` bool: line ends between visual tokens.
            video: ``[B, N]`` bool: visual rows of videos.
            answer: ``[B, N]`` bool: rows behind the prompt, all of them text; None where there are none.
        """
        device = positions.device
        item, ordinal = placement if placement is not None else _in_order(visual, items)
        role = torch.where(visual, int(Role.IMAGE), int(Role.TEXT))
        if video is not None:
            role = role.masked_fill(video, int(Role.VIDEO))
        if newline is not None:
            role = role.masked_fill(newline, int(Role.NEWLINE))
        if answer is not None:
            role = role.masked_fill(answer, int(Role.ANSWER))
        role = role.masked_fill(~valid, int(Role.PAD))
        return cls(
            origin=torch.arange(visual.shape[1], device=device).expand_as(visual),
            role=role.to(device),
            item=item.to(device),
            ordinal=ordinal.to(device),
            positions=positions,
            size=valid.float().to(device),
            items=tuple(tuple(grids) for grids in items),
            live=tuple(valid.sum(1).tolist()),
            visual=tuple(visual.sum(1).tolist()),
            answers=() if answer is None else tuple(answer.sum(1).tolist()),
            pinned=_pinned(visual, valid if answer is None else valid & ~answer),
        )

    def to(self, device: torch.device) -> Layout:
        """The same on ``device``."""
        if self.origin.device == device:
            return self
        tensors = ("origin", "role", "item", "ordinal", "positions", "size")
        return replace(self, **{name: getattr(self, name).to(device) for name in tensors})

    @property
    def shape(self) -> tuple[int, int]:
        """``(B, N)``."""
        return self.origin.shape[0], self.origin.shape[1]

    @property
    def valid(self) -> Tensor:
        """``[B, N]`` rows that are not padding."""
        return self.role != Role.PAD

    @property
    def prompt(self) -> Tensor:
        """``[B, N]`` rows of the prompt, neither padding nor answer: what a method may look at, and may let ask."""
        return self.valid & (self.role != Role.ANSWER) if any(self.answers) else self.valid

    @property
    def without_answers(self) -> Layout:
        """The same rows, those of answers as padding."""
        if not any(self.answers):
            return self
        role = self.role.masked_fill(self.role == Role.ANSWER, int(Role.PAD))
        live = tuple(rows - answer for rows, answer in zip(self.live, self.answers))
        return replace(self, role=role, live=live, answers=())

    def behind(self, earlier: Tensor) -> Layout:
        """The layout of a cache that holds these rows behind ``earlier`` ``[B, P]`` entries (bool: which are no padding).

        Earlier entries are text to whoever ranks them, and none of their own prompt's: origin -1, position 0.
        """
        count = earlier.shape[1]

        def before(rows: Tensor, value: int) -> Tensor:
            return torch.nn.functional.pad(rows, (count, 0), value=value)

        role = torch.where(earlier.to(self.role.device), int(Role.TEXT), int(Role.PAD))
        return replace(
            self,
            origin=before(self.origin, -1),
            role=torch.cat([role, self.role], dim=1),
            item=before(self.item, -1),
            ordinal=before(self.ordinal, -1),
            positions=before(self.positions, 0),
            size=torch.cat([earlier.to(self.size), self.size], dim=1),
            live=tuple(rows + more for rows, more in zip(self.live, earlier.sum(1).tolist())),
        )

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
        """The layout once ``edit`` was applied.

        The place of a prompt's last row is never empty: where that row was merged or dropped, the row that is now the last
        takes its place, as the last of a shorter prompt would.
        """
        reduction = edit.reduction
        pad = ~reduction.valid

        def follow(ids: Tensor, padding: int) -> Tensor:
            return reduction.take(ids).masked_fill(pad, padding)

        role = follow(self.role, int(Role.PAD))
        edited = replace(
            self,
            origin=follow(self.origin, -1).sort(dim=1).values,
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
        if any(self.pinned):
            edited = replace(edited, origin=edited.origin.scatter(1, edited.last, self.origin.gather(1, self.last)))
        return edited

    @property
    def originals(self) -> tuple[int, ...]:
        """Visual tokens of each sample before anything was dropped."""
        return tuple(sum(item.count for item in items) for items in self.items)

    @property
    def alive(self) -> list[list[int]]:
        """Visual rows alive of each item of each sample.

        Known on the host unless a sample with several items has lost some; then they are read from the device.
        """
        known = [
            [seen] if len(items) == 1 else [item.count for item in items] for seen, items in zip(self.visual, self.items)
        ]
        if all(seen == sum(counts) for seen, counts in zip(self.visual, known)):
            return known
        return [[len(ordinal) for ordinal in sample] for sample in self.ordinals()]

    def where(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """``[I, n]`` rows of some items, given as (sample, number), that have n visual rows each, in their order."""
        device = self.item.device
        sample, number = torch.tensor(items, device=device).unbind(1)
        count = self.alive[items[0][0]][items[0][1]]
        return Reduction.keeping(self.item[sample] == number[:, None], (count,) * len(items)).anchor

    def ordinals(self) -> list[list[Tensor]]:
        """Original raster indices of the visual rows alive, for each sample and each of its items (on the host)."""
        item, ordinal = self.item.cpu(), self.ordinal.cpu()
        return [
            [ordinal[sample][item[sample] == number] for number in range(len(images))]
            for sample, images in enumerate(self.items)
        ]

    @property
    def question(self) -> Tensor:
        """``[B, N]`` bool: text rows behind the last visual row of the sample (all text rows where there is none).

        Where no text follows, the prompt's last row asks.
        """
        text = (self.role == Role.TEXT) & behind(self.rows(*VISUAL, Role.NEWLINE))
        last = torch.zeros_like(text).scatter(1, self.last, True)
        return text | (last & ~text.any(1, keepdim=True))

    @property
    def question_rows(self) -> Tensor:
        """``[B, Q]`` rows of each sample's question, ascending, padded on the left with -1.

        Q is what the host knows the question not to exceed: the most rows of a sample that are not visual, at least 1.
        """
        width = max((live - visual for live, visual in zip(self.live, self.visual)), default=0)
        return last_of(self.question, max(width, 1))

    @property
    def last(self) -> Tensor:
        """``[B, 1]`` the last row of each sample's prompt: the one that predicts the next token."""
        return self.shape[1] - 1 - self.prompt.to(torch.uint8).flip(1).argmax(1, keepdim=True)

    @property
    def predicting(self) -> Tensor:
        """``[B, N]`` bool: visual rows that predict the next token (see `pinned`)."""
        return torch.zeros_like(self.valid).scatter(1, self.last, True) & self.rows(*VISUAL)

    def keeping(
        self, chosen: Tensor, visual: tuple[int, ...], positions: Positions = "anchor", *, all_layers: bool = False
    ) -> Edit:
        """The edit that leaves, of the visual rows, only those ``chosen`` ``[B, N]`` (bool): ``visual`` of each sample.

        A row that predicts the next token stays: if it is not among those chosen, instead of the one nearest to it. So the
        budget holds, but that one row stays where it is nothing.
        """
        if any(self.pinned):
            predicting = self.predicting
            visual = tuple(max(count, pinned) for count, pinned in zip(visual, self.pinned))
            others = chosen & ~predicting & self.rows(*VISUAL)
            room = [count - pinned for count, pinned in zip(visual, self.pinned)]
            fits = others.cumsum(1) <= torch.tensor(room, device=others.device)[:, None]
            chosen = (others & fits) | predicting
        live = tuple(n - v + k for n, v, k in zip(self.live, self.visual, visual))
        keep = self.valid & (chosen | ~self.rows(*VISUAL))
        return Edit(Reduction.keeping(keep, live), positions, all_layers=all_layers, live=live, visual=visual)

    def _positions(self, edit: Edit, valid: Tensor) -> Tensor:
        if isinstance(edit.positions, Tensor):
            return edit.positions
        policy = edit.positions
        if policy == "auto":
            policy = "contiguous" if self.positions.shape[0] == 1 else "anchor"
        kept = torch.stack([edit.reduction.take(row) for row in self.positions])
        if policy == "anchor" and edit.text_after == "keep":
            return kept
        if policy == "contiguous":
            rank = (valid.long().cumsum(1) - 1).clamp(min=0)
            return (self._first + rank).masked_fill(~valid, 0)
        return self._regridded(edit, kept, valid, dense=policy == "rank")

    @property
    def _first(self) -> Tensor:
        """``[R, B, 1]`` the smallest position of each row."""
        largest = torch.iinfo(self.positions.dtype).max
        return self.positions.masked_fill(~self.valid, largest).amin(dim=2, keepdim=True)

    def _regridded(self, edit: Edit, kept: Tensor, valid: Tensor, dense: bool) -> Tensor:
        """Positions ``[R, B, k]`` where text follows the largest kept position of each item.

        Within an item positions keep their distances, or are ranked for each axis (``dense``).
        """
        item = edit.reduction.take(self.item).masked_fill(~valid, -1)
        items = max(map(len, self.items), default=0)
        of_item = torch.stack([item == number for number in range(items)])[:, None] if items else item.new_zeros(0).bool()
        if not items:
            return kept
        places = torch.where(of_item, kept, torch.iinfo(kept.dtype).max)  # [J, R, B, k]
        if dense:
            ordered, order = places.sort(dim=-1)
            rises = torch.zeros_like(ordered).scatter(
                -1, order, (ordered.diff(prepend=ordered[..., :1]) != 0).long().cumsum(-1)
            )
        else:
            start = torch.stack([self._item_start(number) for number in range(items)])  # [J, R, B, 1]
            rises = places - start
        # A fourth row in front numbers all tokens; how much room an item takes is said by the others.
        axes = slice(1, None) if len(kept) == 4 else slice(None)
        extent = torch.where(of_item, rises + 1, 0)[:, axes].amax(dim=(1, 3))  # [J, B]
        text = valid & (item < 0)
        before = (text.long().cumsum(1) - text.long())[None]  # text rows before each row
        first = torch.where(of_item, self._rank_of_first(item, items, before), 0)
        offset = extent.cumsum(0) - extent  # [J, B] positions that earlier items take
        inside = torch.where(of_item, rises + first + offset[:, None, :, None], 0).sum(0)
        passed = torch.where(self._passed(item, items), extent[:, :, None], 0).sum(0)  # [B, k]
        outside = (before + passed).expand_as(kept)
        return (self._first + torch.where(item >= 0, inside, outside)).masked_fill(~valid, 0)

    def _item_start(self, number: int) -> Tensor:
        """``[R, B, 1]`` smallest position of an item before the edit."""
        largest = torch.iinfo(self.positions.dtype).max
        return self.positions.masked_fill(self.item != number, largest).amin(dim=2, keepdim=True)

    def _rank_of_first(self, item: Tensor, items: int, before: Tensor) -> Tensor:
        """``[J, 1, B, 1]`` text rows before each item."""
        counts = [
            torch.where(item == number, before[0], before.new_full((), torch.iinfo(before.dtype).max))
            for number in range(items)
        ]
        return torch.stack(counts).amin(dim=2)[:, None, :, None]

    def _passed(self, item: Tensor, items: int) -> Tensor:
        """``[J, B, k]`` whether a row comes behind the last row of an item."""
        there = torch.stack([item == number for number in range(items)])
        return behind(there) & there.any(2, keepdim=True)


def behind(rows: Tensor) -> Tensor:
    """``[..., N]`` bool: rows behind the last one of ``rows`` ``[..., N]`` (all, where there is none)."""
    return rows.flip(-1).cumsum(-1).flip(-1) == 0


def last_of(rows: Tensor, count: int) -> Tensor:
    """``[B, min(count, N)]`` the last ``count`` of ``rows`` ``[B, N]`` (bool), ascending, padded on the left with -1."""
    # A stable sort of the mask leaves the rows, in order, at the end.
    order = rows.to(torch.uint8).argsort(dim=1, stable=True)[:, max(rows.shape[1] - count, 0) :]
    return order.masked_fill(~rows.gather(1, order), -1)


def _pinned(visual: Tensor, prompt: Tensor) -> tuple[int, ...]:
    """Which samples' last row of the ``prompt`` ``[B, N]`` is one of the ``visual`` ones; () = none."""
    last = (prompt * torch.arange(1, prompt.shape[1] + 1)).argmax(1, keepdim=True)
    ends = (visual & prompt).gather(1, last)[:, 0]
    return tuple(ends.int().tolist()) if bool(ends.any()) else ()


def _in_order(visual: Tensor, items: Sequence[Sequence[Item]]) -> tuple[Tensor, Tensor]:
    """Item and ordinal ``[B, N]`` of visual rows that come item by item, in raster order."""
    nth = visual.long().cumsum(1) - 1
    item, ordinal = torch.full_like(nth, -1), torch.full_like(nth, -1)
    for sample, grids in enumerate(items):
        counts = torch.tensor([grid.count for grid in grids], dtype=torch.long)
        if len(counts):
            where = visual[sample]
            item[sample, where] = torch.arange(len(counts)).repeat_interleave(counts)
            ordinal[sample, where] = nth[sample, where] - (counts.cumsum(0) - counts)[item[sample, where]]
    return item, ordinal
