"""The rows of one forward of the language model: which live, where they stand, what they may see."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Role
from foveate.engine import masks
from foveate.engine.intake import Intake
from foveate.engine.ledger import Ledger
from foveate.engine.sides import TEXT, Present, refusal, saying
from foveate.models.anatomy import Anatomy


class Rows:
    """The rows of one forward, from the call of the language model to its return.

    Layers that hold the same tokens share one mask, one rotary table and one ledger.

    Attributes:
        intake: what the model was called with.
        past: tokens that came before.
        given: rows that the caller handed in.
        has_pictures: whether some of them are visual.
        edited: whether any were dropped, merged or moved; ``inserted``: whether any were put in.
        by_role: the method whose linears have to be told what each row is, "" = none.
    """

    by_role = ""

    def __init__(self, anatomy: Anatomy, intake: Intake, positions: Tensor, past: int) -> None:
        self.anatomy, self.intake, self.past = anatomy, intake, past
        self.given = positions.shape[2]
        self.has_pictures = any(map(len, intake.items))
        self.edited = self.inserted = False
        self.device = positions.device
        self._positions = positions
        self._shift: Tensor | None = None
        self._memo: dict[tuple[Any, ...], Any] = {}
        self._visual_tokens: dict[tuple[int, torch.device], tuple[Tensor | None, Tensor]] = {}  # which no edit changes

    @cached_property
    def layout(self) -> Layout:
        """What is alive now; made when first needed."""
        return self.intake.layout(self._positions)

    @property
    def batch(self) -> int:
        """Samples."""
        return self._positions.shape[1]

    def go(self, device: torch.device) -> None:
        """Follow the hidden states to another device."""
        if device == self.device:
            return
        if "layout" in self.__dict__:
            self.layout = self.layout.to(device)
        self._positions = self._positions.to(device)
        self._shift = None if self._shift is None else self._shift.to(device)
        self.device = device
        self._memo.clear()

    def edit(self, edit: Edit) -> None:
        """Go on with what an edit leaves."""
        after = self.layout.after(edit)
        if not (isinstance(edit.positions, str) and edit.positions == "anchor" and edit.text_after == "keep"):
            down = _end(self.layout) - _end(after)
            self._shift = down if self._shift is None else self._shift + down
        self.layout, self.edited = after, True
        self.inserted = self.inserted or edit.inserted is not None
        self._memo.clear()

    def said(self, among: Reduction | None = None) -> AbstractContextManager[None]:
        """These rows, or those ``among`` them, run meanwhile: whoever has to know is told what each is."""
        if not self.by_role:
            return nullcontext()
        if self.given == 1:
            return saying(TEXT)
        if self.intake.ids is None:
            raise refusal(self.by_role)
        return saying(self.once("present", id(among), lambda: self._present(among), keep=among))

    def _present(self, among: Reduction | None) -> Present:
        layout, intake = self.layout, self.intake
        role = layout.role if among is None else among.take(layout.role).masked_fill(~among.valid, int(Role.PAD))
        visual = sum(layout.visual)  # pictures and videos together
        most = {
            Role.IMAGE: visual,
            Role.VIDEO: visual if bool(intake.video.any()) else 0,
            Role.NEWLINE: int(intake.newline.sum()),
            Role.AUDIO: int(intake.audio.sum()),
        }
        return Present(role, {int(role): count for role, count in most.items()})

    # Ledgers.

    @property
    def tokens(self) -> Tensor:
        """``[B, n]`` token number of each row, -1 = padding made by an edit."""
        if not self.edited:
            return torch.arange(self.past, self.past + self.given, device=self.device).expand(self.batch, -1)
        return torch.where(self.layout.origin >= 0, self.layout.origin + self.past, -1)

    def extended(self, old: Ledger) -> Ledger:
        """A layer's ledger once these rows have come."""
        return self.once("extended", old.key, lambda: self._extended(old))

    def marked(self, old: Ledger) -> Ledger:
        """The ledger ``old``, which also knows which of these tokens are visual."""
        return replace(old, visual=self._visual(old)) if self.has_pictures else old

    def moved(self, old: Ledger) -> Tensor | None:
        """``[B]`` by how much tokens behind these move down in a layer."""
        if self._shift is None or old.shift is None:
            return old.shift if self._shift is None else self._shift
        return old.shift.to(self.device) + self._shift

    def _extended(self, old: Ledger) -> Ledger:
        marked = self.marked(old)
        if not self.edited:
            return marked.extended(self.given)
        return marked.appended(self.tokens, self.past + self.given, not self.layout.dense, self.moved(old))

    def _visual(self, old: Ledger) -> Tensor:
        """Which tokens of the conversation are visual."""
        key = (id(old.visual), self.device)
        if key not in self._visual_tokens:
            now = upload(self.intake.visual, self.device)
            before = now.new_zeros(now.shape[0], self.past)
            if old.visual is not None:
                before[:, : old.visual.shape[1]] = old.visual
            self._visual_tokens[key] = old.visual, torch.cat([before, now], dim=1)
        return self._visual_tokens[key][1]

    # Rotary tables and masks.

    def rope(self, layer: int, x: Tensor, given: tuple[Tensor, Tensor], old: Ledger) -> tuple[Tensor, Tensor]:
        """Rotary tables of the rows ``x`` in a layer, ``given`` the model's own."""
        if not self.edited and old.shift is None:
            return given
        kind = self.anatomy.config.layer_types[layer] if self.anatomy.typed_rotary else None

        def tables() -> tuple[Tensor, Tensor]:
            positions = (self.layout.positions if self.edited else self._positions).to(x.device)
            if old.shift is not None:
                positions = (positions - old.shift.to(x.device)[:, None]).clamp(min=0)
            return self.anatomy.rotary(layer, x, positions)

        return self.once("rope", (kind, id(old.shift)), tables)

    def given_to(self, layer: int, x: Tensor, kwargs: dict[str, Any], old: Ledger, new: Ledger) -> dict[str, Any]:
        """What a layer is called with beside the rows ``x``, ``kwargs`` being the model's own words.

        Its cache holds ``old``, and ``new`` once these rows have come.
        """
        if not self.edited and old.complete and old.shift is None:
            return kwargs
        rope = self.rope(layer, x, kwargs["position_embeddings"], old)
        mask = self.mask(kwargs.get("attention_mask"), new, x)
        return dict(unpositioned(kwargs), attention_mask=mask, position_embeddings=rope)

    def mask(self, base: Tensor | None, new: Ledger, x: Tensor, queries: Tensor | None = None) -> Tensor | None:
        """What ``x``, or its rows with the token numbers ``queries``, may see of a layer that holds ``new``.

        None where plain causal attention is right, so that the fastest kernel stays in use.
        """
        in_order = base is None and not new.holes
        if in_order and (x.shape[1] == 1 or self.past == 0 or "flash" in self.anatomy.kernel):
            return None

        def picked() -> Tensor:
            keys = new.dense(x.shape[0], x.device)
            return self.pick(base, self.tokens if queries is None else queries, keys, x)

        return picked() if queries is not None else self.once("mask", (id(base), new.key), picked, keep=base)

    def pick(self, base: Tensor | None, queries: Tensor, keys: Tensor, x: Tensor) -> Tensor:
        """The mask of rows with the token numbers ``queries`` over entries ``keys``, as the kernel wants it."""
        base = None if base is None else base.to(x.device)
        mask = masks.pick(base, queries, keys, self.past, self.anatomy.kernel, x, in_order=self.inserted)
        return masks.by_head(mask, self.anatomy.config.num_attention_heads)

    def once(self, what: str, key: Any, make: Callable[[], Any], keep: Any = None) -> Any:
        """What layers with the same ``key`` share; ``keep`` is an object whose id is part of it."""
        entry = (what, key)
        if entry not in self._memo:
            self._memo[entry] = (keep, make())
        return self._memo[entry][1]

    # The caller's layout.

    def restored(self, x: Tensor) -> Tensor:
        """Hidden states ``[B, n, D]`` of what is alive in the caller's layout; the rest is zero."""
        if not self.edited:
            return x
        index = self._places(self.layout).to(x.device)
        out = x.new_zeros(x.shape[0], self.given + 1, x.shape[2])
        return out.scatter(1, index[..., None].expand_as(x), x)[:, : self.given]

    @property
    def alive(self) -> Tensor:
        """``[B, rows]`` bool: which rows of the caller's layout are alive."""
        index = self._places(self.layout)
        alive = torch.zeros(len(index), self.given + 1, dtype=torch.bool, device=index.device)
        return alive.scatter(1, index, True)[:, : self.given]

    def _places(self, layout: Layout) -> Tensor:
        """``[B, n]`` places of rows in the caller's layout; padding and rows put in have a spare one behind its last."""
        return layout.origin.masked_fill((layout.origin < 0) | (layout.role == Role.INSERTED), self.given)


def _end(layout: Layout) -> Tensor:
    """``[B]`` the largest rotary position of each sample, behind which later text goes on."""
    positions = layout.positions[1:] if len(layout.positions) == 4 else layout.positions  # a row in front numbers the tokens
    return positions.masked_fill(~layout.valid, 0).amax((0, 2))


def unpositioned(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Without position ids: FlashAttention would take gaps in them for packed sequences, and the tables are made already."""
    return dict(kwargs, position_ids=None)


def positions_of(given: Tensor | None, batch: int, rows: int, past: int, device: torch.device) -> Tensor:
    """``[R, B, N]`` the ``given`` positions, or those that the language model would make itself."""
    if given is None:
        given = torch.arange(past, past + rows, device=device)[None]
    return (given if given.ndim == 3 else given[None]).expand(-1, batch, -1)
