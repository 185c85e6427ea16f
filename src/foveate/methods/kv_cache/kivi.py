"""KIVI: keep the cached entries in two bits a number, keys by channel and values by token, the last ones as they are.

Paper: "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", arXiv 2402.02750. A baseline that asks for no
attention, drops no token and knows nothing of pictures. Keys are quantized behind their rotation, each channel of ``size``
consecutive tokens between its least and its largest number; values within a token, ``size`` channels of a head at a time;
numbers lie in bytes, with a step and a lowest value for each group in the model's dtype. Differs from the paper: only the
prompt is packed, and what is generated stays as it is, where the paper packs that, too, whenever ``residual`` tokens have
come; keys and values have the same window of at least ``residual`` tokens, beyond which there are whole groups (the code has
less than ``residual`` for keys and just as many for values); a step rebuilds one layer's keys and values, where the code
multiplies packed ones in kernels of its own. Where a head's width is no multiple of ``size``, groups of its values are
as wide as the largest number that divides both. A prompt behind the one that was packed stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Packed
from foveate.core.parameters import AtLeast
from foveate.core.registry import register
from foveate.core.roles import last_of
from foveate.core.shape import Shape
from foveate.core.signal import Seen
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.quantized import Quantized
from foveate.ops.rebuilt import chosen


def packable(lengths: Sequence[int], size: int, residual: int) -> list[int]:
    """How many entries of each sample, its first ones, are packed: whole groups, at least ``residual`` behind them."""
    return [max(length - residual, 0) // size * size for length in lengths]


def first_of(rows: Tensor, counts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first ``counts[b]`` of ``rows`` ``[B, N]`` (bool): indices ``[B, max(counts)]``, -1 behind them, and a mask."""
    limit = upload(counts, rows.device)[:, None]
    order = (~rows).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(counts)]
    spare = torch.arange(order.shape[1], device=rows.device) >= limit
    return order.masked_fill(spare, -1), rows & (rows.cumsum(1) <= limit)


@register
@dataclass(frozen=True)
class KIVI(Cache):
    """Keep a prompt's entries in a few bits."""

    name = "kivi"
    title = "KIVI"
    group = "kv_cache"
    paper = "arXiv 2402.02750"
    helps = (
        "A baseline: every token stays, of text and pictures alike, in a fifth of the bytes, and no attention is asked for."
    )
    needs = ("cache ownership",)
    identity_at = {"residual": 1 << 30}  # noqa: RUF012

    bits: Literal[2, 4, 8] = 2
    """Bits of a number."""
    size: Annotated[int, AtLeast(8)] = 32
    """Numbers that share a step and a lowest value: tokens of a channel of keys, channels of a value. A multiple of 8."""
    residual: Annotated[int, AtLeast(0)] = 128
    """Entries at the end of the prompt that stay as they are, at least; shorter prompts are left alone."""

    def __post_init__(self) -> None:
        """Groups fill bytes."""
        super().__post_init__()
        self.require(self.size % 8 == 0, "size", "must be a multiple of 8, such as 32")

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """What a number is worth."""
        return {"bits": (2, 4, 8)}

    def workspace(self, shape: Shape) -> int:
        """The packed prompt in all layers, and keys and values of one while they are packed or read."""
        packed = shape.keys * self.bits // (8 * shape.itemsize) + 4 * shape.keys // min(self.size, shape.head_width)
        return shape.edits + 2 * shape.layers * packed + 4 * shape.keys + 6 * shape.floats(shape.keys)

    def pack(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Packed | None:
        """The prompt in bits, all but its end; None where it is too short."""
        counts = packable(layout.live, self.size, self.residual)
        if not any(counts):
            return None
        entries, packed = first_of(layout.valid, counts)
        others = tuple(live - count for live, count in zip(layout.live, counts))
        there = entries >= 0 if len(set(counts)) > 1 else None
        store = Quantized.of(chosen(keys, entries), chosen(values, entries), self.bits, self.size, there)
        return Packed(store, entries[:, None], last_of(layout.valid & ~packed, max(others))[:, None], others)
