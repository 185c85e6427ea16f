"""The ledger of what is alive: one row for each live position of the language model's sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import gt

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.edit import Edit
from foveate.core.positions import Positions, renumbered
from foveate.core.reduction import Reduction
from foveate.core.roles import VISUAL, Item, Role, behind, in_order, last_of, pinned

__all__ = ["Edit", "Layout"]


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
        by_item: visual rows of each item of each sample (on the host), where an edit has said so; see `alive`.
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
    by_item: tuple[tuple[int, ...], ...] | None = None
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
        audio: Tensor | None = None,
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
            audio: ``[B, N]`` bool: rows of sound.
            answer: ``[B, N]`` bool: rows behind the prompt, all of them text; None where there are none.
        """
        device = positions.device
        item, ordinal = placement if placement is not None else in_order(visual, items)
        role = torch.where(visual, int(Role.IMAGE), int(Role.TEXT))
        if video is not None:
            role = role.masked_fill(video, int(Role.VIDEO))
        if audio is not None:
            role = role.masked_fill(audio, int(Role.AUDIO))
        if newline is not None:
            role = role.masked_fill(newline, int(Role.NEWLINE))
        if answer is not None:
            role = role.masked_fill(answer, int(Role.ANSWER))
        role = role.masked_fill(~valid, int(Role.PAD))
        return cls(
            origin=torch.arange(visual.shape[1], device=device).expand_as(visual),
            role=upload(role, device),
            item=upload(item, device),
            ordinal=upload(ordinal, device),
            positions=positions,
            size=upload(valid.float(), device),
            items=tuple(tuple(grids) for grids in items),
            live=tuple(valid.sum(1).tolist()),
            visual=tuple(visual.sum(1).tolist()),
            answers=() if answer is None else tuple(answer.sum(1).tolist()),
            pinned=pinned(visual, valid if answer is None else valid & ~answer),
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

    def behind(self, earlier: Tensor, counts: tuple[int, ...]) -> Layout:
        """The layout of a cache that holds these rows behind ``earlier`` entries.

        ``earlier`` ``[B, P]`` (bool) says which are no padding, ``counts`` how many of each sample.

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
            live=tuple(rows + more for rows, more in zip(self.live, counts)),
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
        width = upload(columns, self.item.device).gather(1, self.item.clamp(min=0))
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
        positions = edit.positions
        if not isinstance(positions, Tensor):
            positions = renumbered(
                self.positions,
                reduction,
                positions,
                edit.text_after,
                item=self.item,
                items=max(map(len, self.items), default=0),
                valid=self.valid,
                alive=role != Role.PAD,
            )
        edited = replace(
            self,
            origin=follow(self.origin, -1).sort(dim=1).values,
            role=role,
            item=follow(self.item, -1),
            ordinal=follow(self.ordinal, -1),
            positions=positions,
            size=reduction.mass(self.size),
            live=edit.live or (),
            visual=edit.visual or (),
            by_item=edit.by_item,
        )
        if edit.inserted is not None:
            edited = edited._with_inserted(edit.inserted, follow(self.origin, -1), follow(self.size, 0))
        if edit.live is None:
            edited = replace(edited, live=tuple(edited.valid.sum(1).tolist()))
        if edit.visual is None:
            edited = replace(edited, visual=tuple(edited.rows(*VISUAL).sum(1).tolist()))
        if any(self.pinned):
            edited = replace(edited, origin=edited.origin.scatter(1, edited.last, self.origin.gather(1, self.last)))
        return edited

    def _with_inserted(self, rows: Tensor, origin: Tensor, size: Tensor) -> Layout:
        """With ``rows`` ``[B, N]`` (bool) put in between others that have ``origin`` and ``size`` ``[B, N]``."""
        return replace(
            self,
            origin=origin.masked_fill(rows, -1).cummax(1).values,
            role=self.role.masked_fill(rows, int(Role.INSERTED)),
            item=self.item.masked_fill(rows, -1),
            ordinal=self.ordinal.masked_fill(rows, -1),
            size=size.masked_fill(rows, 0),
        )

    @property
    def originals(self) -> tuple[int, ...]:
        """Visual tokens of each sample before anything was dropped."""
        return tuple(sum(item.count for item in items) for items in self.items)

    @cached_property
    def alive(self) -> list[list[int]]:
        """Visual rows alive of each item of each sample.

        Known on the host unless a sample with several items has lost some by an edit that did not say how many of which;
        then they are read from the device, once.
        """
        if self.by_item is not None:
            return [list(counts) for counts in self.by_item]
        known = [
            [seen] if len(items) == 1 else [item.count for item in items] for seen, items in zip(self.visual, self.items)
        ]
        if all(seen == sum(counts) for seen, counts in zip(self.visual, known)):
            return known
        number = torch.arange(max(map(len, self.items)), device=self.item.device)
        counts = (self.item[..., None] == number).sum(1).tolist()
        return [of[: len(items)] for of, items in zip(counts, self.items)]

    @cached_property
    def parted(self) -> tuple[Tensor, Tensor, Tensor]:
        """Visual rows ``[B, n]`` and others ``[B, m]``, ascending, padded on the left with -1; positions ``[R, B, n]`` of
        the former, int32. Layers with one layout get the same tensors.
        """
        rows = self.rows(*VISUAL)
        visual = last_of(rows, max(self.visual, default=0))
        others = last_of(self.valid & ~rows, max((n - v for n, v in zip(self.live, self.visual)), default=0))
        return visual, others, self.positions.gather(2, visual.clamp(min=0).expand(len(self.positions), -1, -1)).int()

    def where(self, items: Sequence[tuple[int, int]]) -> Tensor:
        """``[I, n]`` rows of some items, given as (sample, number), that have n visual rows each, in their order."""
        sample, number = upload(items, self.item.device).unbind(1)
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

    def with_predicting(self, chosen: Tensor, visual: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
        """The visual rows that predict the next token (see `pinned`), and of those ``chosen`` as many as then fit.

        ``chosen`` ``[B, N]`` (bool) holds ``visual`` of them in each sample; so does what is returned, at least the former.
        """
        predicting, visual = self.predicting, tuple(map(max, visual, self.pinned))
        others = chosen & ~predicting & self.rows(*VISUAL)
        room = [count - pinned for count, pinned in zip(visual, self.pinned)]
        return predicting | (others & (others.cumsum(1) <= upload(room, others.device)[:, None])), visual

    def keeping(
        self,
        chosen: Tensor,
        visual: tuple[int, ...],
        positions: Positions = "anchor",
        *,
        all_layers: bool = False,
        by_item: tuple[tuple[int, ...], ...] | None = None,
    ) -> Edit:
        """The edit that leaves, of the visual rows, only those ``chosen`` ``[B, N]`` (bool): ``visual`` of each sample.

        A row that predicts the next token stays: if it is not among those chosen, instead of the one nearest to it. So the
        budget holds, but that one row stays where it is nothing.
        """
        if any(self.pinned):
            by_item = None if any(map(gt, self.pinned, visual)) else by_item
            chosen, visual = self.with_predicting(chosen, visual)
        live = tuple(n - v + k for n, v, k in zip(self.live, self.visual, visual))
        keep = self.valid & (chosen | ~self.rows(*VISUAL))
        kept = Reduction.keeping(keep, live)
        return Edit(kept, positions, all_layers=all_layers, live=live, visual=visual, by_item=by_item)
