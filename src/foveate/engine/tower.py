"""The rows of one encoder while pictures go through it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.engine import grids
from foveate.models.anatomy import Anatomy, Encoder, View


class Tower:
    """What is alive in an encoder, of which a family may have several.

    Attributes:
        encoder: its parts; number: which of the family's it is; first: the number of its first block, counted over them all.
        layout: its rows, None while nobody has asked.
        rows: patches of a tile.
    """

    def __init__(self, encoder: Encoder, number: int, first: int) -> None:
        self.encoder, self.number, self.first = encoder, number, first
        self.layout: Layout | None = None
        self.rows = 0
        self._bias: Tensor | None = None

    @classmethod
    def all_of(cls, anatomy: Anatomy) -> list[Tower]:
        """Those of a family."""
        return [cls(encoder, number, anatomy.first_block(number)) for number, encoder in enumerate(anatomy.towers)]

    def begin(self, x: Tensor, prefix: int) -> Layout:
        """The layout of the rows ``x`` ``[T, n, D]``, square grids behind ``prefix`` summary rows if it is not known yet."""
        if self.layout is None:
            side = math.isqrt(x.shape[1] - prefix)
            self.rows = side * side
            there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            self.layout = grids.picture_layout([(side, side, 1)] * x.shape[0], there, prefix)
        self.layout = self.layout.to(x.device)
        return self.layout

    def apply(self, edit: Edit, x: Tensor) -> Tensor:
        """The rows after an edit."""
        assert self.layout is not None
        self.layout = self.layout.after(edit)
        if edit.key_bias is not None:
            self._bias = edit.key_bias
        elif self._bias is not None:
            self._bias = edit.reduction.take(self._bias.to(x.device))
        return edit.values if edit.values is not None else edit.reduction.apply(x)

    def mask(self, x: Tensor) -> Tensor | None:
        """``[T, 1, 1, n]`` additive: key bias, and -inf at the padding of ragged images."""
        layout = self.layout
        if layout is None or (self._bias is None and layout.dense):
            return None
        bias = x.new_zeros(layout.shape) if self._bias is None else self._bias.to(x)
        if not layout.dense:
            bias = bias.masked_fill(~layout.valid.to(x.device), torch.finfo(x.dtype).min)
        return bias[:, None, None].expand(-1, -1, x.shape[1], -1)

    def fed(self, views: Sequence[View]) -> dict[int, Tensor | None]:
        """By number, the rows that its projector is fed for the tokens of its views."""
        return {n: self.encoder.fed(view) for n, view in enumerate(views) if view.encoder == self.number}
