"""AttentionPack: keep the cached entries of pictures as two thin factors, and read less of the rank of what matters less.

Paper: "AttentionPack: Attention-aware Inference Optimizations for Large Vision-Language Models with Memory-efficient
Decoding", arXiv 2603.23914. Once a prompt is read, keys and values of its visual entries are decomposed in every layer, all
heads side by side; no token is dropped, text stays exact. Each step of decoding rebuilds one layer's keys; values are
multiplied factor by factor and never rebuilt, the entries that attention has favoured lately at full rank, the others at a
part of it. Differs from the released code: the decomposition is computed once (the code does it again at every step once the
text is long); left factors are stored with their singular values; what stands before and behind the pictures is found, not
assumed; each sample has its own groups. Keys are decomposed as they were before their rotation, as in the code: the paper
does not say. ``weight``, ``grouping`` and ``least`` choose between paper and code. Reconstructed: the first importance of an
entry is what the prompt's last row gives it, as in the code; forwards of several tokens leave it alone. Decomposing has the
host wait for the device once in each layer. A prompt behind the one that was packed stays as it is, pictures too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Packed
from foveate.core.parameters import AtLeast, In, Shares
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Function, Rows, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.ops.lowrank import LowRank, Tiers, factorise, joint
from foveate.ops.rebuilt import chosen


def first_importance(attention: Tensor, entries: Tensor) -> Tensor:
    """What a row of ``attention`` ``[B, H, n]`` gives ``entries`` ``[B, T]``, the mean over heads; -inf where one is -1."""
    return attention.mean(1).gather(1, entries.clamp(min=0)).masked_fill(entries < 0, float("-inf"))


@register
@dataclass(frozen=True)
class AttentionPack(Cache):
    """Keep visual entries in factors of low rank."""

    name = "attentionpack"
    title = "AttentionPack"
    group = "kv_cache"
    paper = "arXiv 2603.23914"
    helps = "Many requests at once, or many pictures, where the cache is too large: every token stays, in fewer bytes."
    needs = ("decoder attention rows (all layers, or shares=(1.0,), ranks=(1.0,))", "cache ownership")
    textual = False
    identity_at = {"rank": 65536, "value_rank": None, "shares": (1.0,), "ranks": (1.0,)}  # noqa: RUF012

    rank: Annotated[int, AtLeast(1)] = 64
    """Rank that keys are kept at, in every layer; the paper has 64 for pictures and 128 for videos. Where it is more than
    there are visual entries, or numbers in a token's keys, nothing is lost, and nothing saved.
    """
    value_rank: Annotated[int, AtLeast(1)] | None = None
    """Rank that values are kept at; None = that of keys."""
    shares: Annotated[tuple[float, ...], Shares()] = (0.25, 0.75)
    """Shares of the visual entries, the most important first, whose values are read at the ranks of ``ranks``."""
    ranks: Annotated[tuple[float, ...], Shares()] = (1.0, 0.25)
    """Parts of the rank that values are read at, for each of the ``shares``."""
    weight: Annotated[float, In(0.01, 1)] = 0.25
    """Of the past in the running mean of attention that a step of decoding moves importance by; the code has 0.5."""
    grouping: Literal["steps", "prompt"] = "steps"
    """Whether importance moves with every step of decoding (the paper), or stays what the prompt's last row makes it
    (``"prompt"``, the code).
    """
    least: Annotated[int, AtLeast(0)] = 0
    """Prompts with fewer rows are left alone; the code has 500, the paper none."""

    def __post_init__(self) -> None:
        """One rank for each share, falling."""
        super().__post_init__()
        self.require(abs(sum(self.shares) - 1) < 1e-6, "shares", "must add up to 1, such as (0.25, 0.75)")
        fits = len(self.ranks) == len(self.shares) and self.ranks[0] == 1 and min(self.ranks) > 0
        falls = fits and all(high >= low for high, low in pairwise(self.ranks))
        self.require(falls, "ranks", f"must be {len(self.shares)} falling parts of the rank, the first 1, as many as shares")

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """How keys are turned back, and the last row's attention in every layer."""
        layers = [n for n in range(traits.decoder_layers) if n not in traits.recurrent and n not in traits.sliding]
        rows = [_last(layer) for layer in layers] if len(self.shares) > 1 else []
        return (*(Function("unrotate", layer) for layer in layers), *rows)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """What is kept of keys and values; shares, which add up to 1, and the ranks that go with them stay."""
        return {"rank": (16, 32, 64, 128), "shares": (self.shares,), "ranks": (self.ranks,)}

    def workspace(self, shape: Shape) -> int:
        """The factors of all layers, and keys and values of one while they are decomposed."""
        width = shape.kv_heads * shape.head_width
        rank = min(max(self.rank, self._value_rank), shape.visual, width)
        numbers = 2 * shape.samples * rank * (shape.visual + width)
        factors = shape.layers * (numbers * shape.itemsize + 6 * shape.samples * shape.visual * 8)
        return shape.edits + shape.attention(1) + factors + 8 * shape.floats(shape.keys) + 4 * width * rank * 8

    def pack(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Packed | None:
        """The visual entries' factors; None where there are none."""
        counts = [0 if live < self.least else count for live, count in zip(layout.live, layout.visual)]
        if not any(counts):
            return None
        entries, rest, positions = _parted(layout, counts)
        mine = chosen(keys, entries)
        still = seen[Function("unrotate", layer)](mine.to(torch.promote_types(mine.dtype, torch.float32)), positions.long())
        key, value = (
            tuple(factor.to(keys.dtype) for factor in factorise(joint(x), rank))
            for x, rank in ((still, self.rank), (chosen(values, entries), self._value_rank))
        )
        store = LowRank(
            (key[0], key[1]),
            (value[0], value[1]),
            keys.shape[1],
            positions,
            there=entries >= 0 if len(set(counts)) > 1 else None,
            tiers=self._tiers(layer, value[0].shape[2], counts, entries, seen),
        )
        others = tuple(live - count for live, count in zip(layout.live, counts))
        return Packed(store, entries[:, None], rest[:, None], others)

    def _tiers(self, layer: int, rank: int, counts: list[int], entries: Tensor, seen: Seen) -> Tiers | None:
        if len(self.shares) == 1:
            return None
        attention: Attention = seen[_last(layer)]
        ranks = [min(max(round(part * self._value_rank), 1), rank) for part in self.ranks]
        weight = self.weight if self.grouping == "steps" else None
        return Tiers.of(ranks, self.shares, counts, first_importance(attention.probabilities()[:, :, 0], entries), weight)

    @property
    def _value_rank(self) -> int:
        return self.rank if self.value_rank is None else self.value_rank


def _last(layer: int) -> Rows:
    return Rows(Site("decoder", layer), 1, keys="cache")


def _parted(layout: Layout, counts: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """See `Layout.parted`; of samples that are left alone, whose ``counts`` are 0, all rows are others."""
    if tuple(counts) == layout.visual:
        return layout.parted
    packed = layout.rows(*VISUAL) & (upload(counts, layout.role.device) > 0)[:, None]
    entries = last_of(packed, max(counts))
    rest = last_of(layout.valid & ~packed, max(live - count for live, count in zip(layout.live, counts)))
    index = entries.clamp(min=0).expand(len(layout.positions), -1, -1)
    return entries, rest, layout.positions.gather(2, index).int()
