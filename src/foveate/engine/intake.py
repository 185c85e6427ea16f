"""From what the model was called with to the `Layout` of the forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.roles import Item, behind
from foveate.engine.vision import Look
from foveate.models.anatomy import Anatomy, Picture

PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")
"""Arguments that tell prompts apart which lie behind each other in one row."""


@dataclass(frozen=True)
class Intake:
    """What a call of the multimodal model says about its rows, on the host.

    Attributes:
        visual, newline, video, audio: ``[B, q]`` rows that are visual tokens, line ends between them, of a video, of sound.
        valid: ``[B, q]`` rows that are not padding.
        item, ordinal: ``[B, q]`` grid of each visual row and its place there, -1 elsewhere.
        items: grids of each sample, in the order of the prompt.
        ids: ``[B, q]`` token ids as given; those of a single row where the model has them.
        before: ``[B, past]`` which earlier tokens are not padding, None = all.
        answer: ``[B, q]`` rows behind the prompt, None = none.
    """

    visual: Tensor
    newline: Tensor
    video: Tensor
    audio: Tensor
    valid: Tensor
    item: Tensor
    ordinal: Tensor
    items: tuple[tuple[Item, ...], ...]
    ids: Tensor | None = None
    before: Tensor | None = None
    answer: Tensor | None = None

    @classmethod
    def plain(cls, batch: int, rows: int, ids: Tensor | None = None) -> Intake:
        """Text only, nothing padded."""
        no, nowhere = torch.zeros(batch, rows, dtype=torch.bool), torch.full((batch, rows), -1)
        return cls(no, no, no, no, ~no, nowhere, nowhere, ((),) * batch, ids)

    @classmethod
    def read(
        cls,
        anatomy: Anatomy,
        kwargs: Mapping[str, Any],
        looks: Sequence[Look],
        *,
        prompt: int | None = None,
    ) -> Intake:
        """From the keyword arguments of the multimodal model and what was encoded for this prompt.

        Args:
            anatomy: of the model.
            kwargs: what the multimodal model was called with, and the ``labels`` ``[B, q]``, if any (see `answers`).
            looks: what was encoded.
            prompt: columns of the prompt, where others (generated without a cache) come behind.
        """
        ids = kwargs.get("input_ids")
        if ids is None:
            raise FoveateError("inputs_embeds: a prompt under a recipe needs input_ids (they say which rows are visual)")
        batch, rows = ids.shape
        if rows == 1:
            return cls.plain(batch, rows)
        host = ids.cpu()
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.ndim == 2
        valid, before = torch.ones_like(host, dtype=torch.bool), None
        if padded:
            before, valid = mask.bool().cpu().split([mask.shape[1] - rows, rows], dim=1)
        tokens = {"image": anatomy.image_tokens, "video": anatomy.video_tokens}
        shown = {kind: torch.isin(host, torch.tensor(known, dtype=host.dtype)) for kind, known in tokens.items()}
        item, ordinal = torch.full((batch, rows), -1), torch.full((batch, rows), -1)
        found: list[list[tuple[int, Item, Tensor, Tensor]]] = [[] for _ in range(batch)]
        offset = 0
        for kind, where in shown.items():
            mine = [look for look in looks if look.kind == kind]
            for sample, dealt in enumerate(_deal(where.sum(1).tolist(), mine, offset)):
                found[sample] += _place(where[sample].nonzero()[:, 0], dealt)
            offset += sum(len(look.views) for look in mine)
        items = []
        for sample, grids in enumerate(found):
            grids.sort(key=lambda grid: grid[0])
            for number, (_, _, places, cells) in enumerate(grids):
                item[sample, places], ordinal[sample, places] = number, cells
            items.append(tuple(grid[1] for grid in grids))
        visual = ordinal >= 0
        placeholder = shown["image"] | shown["video"]
        answer = valid & (torch.arange(rows) >= prompt) if prompt is not None and prompt < rows else None
        labels = kwargs.get("labels")
        if labels is not None:
            answer = answers(labels.cpu(), placeholder, valid)
        newline, video = placeholder & ~visual, shown["video"] & visual
        audio = torch.isin(host, torch.tensor(anatomy.audio_tokens, dtype=host.dtype))
        return cls(visual, newline, video, audio, valid, item, ordinal, tuple(items), host, before, answer)

    def refuse_packed(self, kwargs: Mapping[str, Any]) -> None:
        """Refuse rows that hold several prompts: what of a picture is kept would depend on another's question.

        Only for calls outside of ``generate``, which packs nothing: it reads ``position_ids``, if they are given.

        Raises:
            FoveateError: with the remedy.
        """
        named = next((name for name in PACKED if kwargs.get(name) is not None), None)
        positions = kwargs.get("position_ids")
        if named is None and isinstance(positions, Tensor) and restarts(positions.cpu(), self.valid, self.visual):
            named = "position_ids"
        if named is not None:
            raise FoveateError(f"{named}: several prompts are packed into one row; give each a row of its own, with padding")

    def refuse_encoded_elsewhere(self, looks: Sequence[Look]) -> None:
        """Refuse pictures that were not encoded under this session: nobody knows their grids, nor what methods read there.

        Raises:
            FoveateError: with the remedy.
        """
        known = {look.kind for look in looks if look.pictures}
        for kind, shown in (("image", self.visual & ~self.video), ("video", self.video)):
            if kind not in known and bool(shown.any()):
                raise FoveateError(
                    f"input_ids: {int(shown.sum())} {kind} placeholders, but no {kind} was encoded under this session; hand "
                    "in pixels, or mm_encoder_outputs from session.encode(...)"
                )

    def layout(self, positions: Tensor) -> Layout:
        """The layout of the unedited sequence, on the device of ``positions``."""
        return Layout.build(
            self.visual,
            self.valid,
            positions,
            self.items,
            placement=(self.item, self.ordinal),
            newline=self.newline,
            video=self.video,
            audio=self.audio,
            answer=self.answer,
        )

    def there(self, tokens: Tensor, past: int) -> Tensor:
        """Which entries ``tokens`` ``[B, n]`` of a cache that was shown ``past`` tokens are no padding."""
        there = tokens >= 0
        if self.before is None or self.before.shape[1] != past:
            return there
        return there & upload(self.before, tokens.device).gather(1, tokens.clamp(min=0))

    def shown(self, past: int) -> tuple[int, ...]:
        """How many of the ``past`` tokens before these are no padding, of each sample."""
        if self.before is None or self.before.shape[1] != past:
            return (past,) * len(self.valid)
        return tuple(self.before.sum(1).tolist())

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sample's conversation so far, padding not counted."""
        now = self.valid.sum(1)
        return tuple((now if self.before is None else now + self.before.sum(1)).tolist())

    @property
    def question(self) -> Tensor:
        """``[B, q]`` text rows of the prompt behind the last visual row of each sample."""
        question = self.valid & behind(self.visual | self.newline) & ~self.audio
        return question if self.answer is None else question & ~self.answer


def on_host(incoming: Mapping[str, Any], labels: Tensor | None, *, positions: bool) -> Mapping[str, Any]:
    """What `Intake` is to ask of a prompt, on the host already: asked later, it would wait for the encoder.

    ``positions``: whether it asks for ``position_ids``, too.
    """
    ids = incoming.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape[1] == 1:
        return incoming
    asked = {"input_ids": ids, "attention_mask": incoming.get("attention_mask"), "labels": labels}
    if positions:
        asked["position_ids"] = incoming.get("position_ids")
    known = {name: value.cpu() for name, value in asked.items() if isinstance(value, Tensor) and value.ndim < 4}
    return {**incoming, **known}


def restarts(positions: Tensor, valid: Tensor, visual: Tensor) -> bool:
    """Whether positions start again within a row, as those of packed prompts do.

    Text has a larger position than all that is before it, a visual row than all text before it: on a grid they go back and
    forth.

    Args:
        positions: ``[R, B, q]`` or ``[B, q]``, on the host.
        valid: ``[B, q]`` bool: rows that are not padding.
        visual: ``[B, q]`` bool.
    """
    axes = positions if positions.ndim == 3 else positions[None]
    axes = axes[:1] if len(axes) == 4 else axes  # a row in front of three numbers all tokens
    low, high = axes.amin(0), axes.amax(0)
    text = valid & ~visual

    def before(rows: Tensor) -> Tensor:
        largest = high.masked_fill(~rows, -1).cummax(1).values
        return torch.nn.functional.pad(largest[:, :-1], (1, 0), value=-1)

    return bool((valid & (low <= torch.where(text, before(valid), before(text)))).any())


def answers(labels: Tensor, placeholder: Tensor, valid: Tensor) -> Tensor | None:
    """``[B, q]`` rows behind the prompts, or None where there are none: from the first one to be predicted to the end.

    That is the first with a label behind the sample's last picture: what is told before it, an earlier answer perhaps, is
    part of the prompt, and so is a sample's first row, which nothing predicts.

    Args:
        labels: ``[B, q]``, -100 where nothing is to be predicted.
        placeholder: ``[B, q]`` bool: rows of pictures.
        valid: ``[B, q]`` bool: rows that are not padding.
    """
    told = (labels != -100) & valid & behind(placeholder) & (valid.cumsum(1) > 1)
    answer = (told.cumsum(1) > 0) & valid
    return answer if bool(answer.any()) else None


_Dealt = list[tuple[Item, Tensor]]
"""Grids of one sample with, for each, the places of its tokens among the sample's placeholders (by raster index)."""


def _deal(counts: Sequence[int], looks: Sequence[Look], offset: int) -> list[_Dealt]:
    """Pictures to samples, and each sample's placeholders; ``generate`` may have repeated samples (beams, several answers).

    ``offset`` counts the grids of other kinds before.
    """
    pictures, sources = [], []
    for look in looks:
        for picture in look.pictures:
            pictures.append(picture)
            sources.append(offset)
            offset += len(picture.views)
    sizes = [picture.count for picture in pictures]
    total, encoded = sum(counts), sum(sizes)
    if total == 0:
        return [[] for _ in counts]
    if encoded == 0:  # features that were encoded outside of this session: the grid is not known
        return [[(Item(1, count, 0), torch.arange(count))] if count else [] for count in counts]
    repeats = total // encoded
    if total % encoded or len(counts) % repeats:
        raise _mismatch(total, encoded)
    dealt: list[_Dealt] = []
    number = 0
    for count in counts[::repeats]:
        mine: _Dealt = []
        start = 0
        while start < count and number < len(pictures):
            for view, (grid, slots) in enumerate(zip(pictures[number].views, pictures[number].slots)):
                source = sources[number] + view
                mine.append((Item(grid.rows, grid.columns, source, grid.frames, grid.encoder), start + slots))
            start += sizes[number]
            number += 1
        if start != count:
            film = len(pictures[number - 1].views) == 1 and pictures[number - 1].views[0].frames > 1
            raise _cut(pictures[number - 1]) if film and start > count else _mismatch(total, encoded)
        dealt += [mine] * repeats
    return dealt


def _place(rows: Tensor, dealt: _Dealt) -> list[tuple[int, Item, Tensor, Tensor]]:
    """First row, grid, rows and raster indices of each grid, given the rows of a sample's placeholders."""
    return [(int(rows[places].min()), item, rows[places], torch.arange(item.count)) for item, places in dealt]


def _cut(film: Picture) -> FoveateError:
    return FoveateError(
        f"films: a video of {film.views[0].frames} frames goes on beyond its prompt; count the pictures of each prompt"
    )


def _mismatch(total: int, encoded: int) -> FoveateError:
    return FoveateError(
        f"input_ids: {total} image placeholders for {encoded} encoded visual tokens; pass every image's placeholders in "
        "one forward (prefill_chunk_size=None)"
    )
