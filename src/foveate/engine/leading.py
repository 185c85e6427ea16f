"""First entries of a layer that stay next to the others: as those between go, they move up in rotary position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.store import Turn


@dataclass(frozen=True)
class Leading:
    """First entries of a layer, turned anew from the same keys however often they move.

    To attention, which goes by differences of positions, this is the same as moving all others down. A sample of one entry
    has none, and its entry stands for it, unmoved.

    Attributes:
        keys: ``[B, Hkv, s, d]`` before they have moved, without the scale of the family's rotary tables; float32 at least.
        places: ``[B, s]`` their columns; where a sample has fewer, its last one again.
        counts: how many of each sample.
        by: how far those of each sample have moved.
    """

    keys: Tensor
    places: Tensor
    counts: tuple[int, ...]
    by: tuple[int, ...]

    @classmethod
    def of(cls, keys: Tensor, first: Sequence[int], counts: Sequence[int], unturn: Turn) -> Leading:
        """Of each sample the ``counts`` entries of ``keys`` ``[B, Hkv, n, d]`` from column ``first`` on."""
        places = _places(first, counts, keys.device)
        chosen = keys.gather(2, _at(places, keys)).to(torch.promote_types(keys.dtype, torch.float32))
        return cls(unturn(chosen, torch.zeros_like(places)[None]), places, tuple(counts), (0,) * len(counts))

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return self.keys.nbytes + self.places.nbytes

    def batched(self, index: Tensor, samples: Sequence[int]) -> Leading:
        """With the batch entries ``index`` ``[B']``, which are the ``samples``; without those, beams of the same ones."""
        keys, places = (part.index_select(0, index.to(part.device)) for part in (self.keys, self.places))
        counts, by = (tuple(of[sample] for sample in samples) if samples else of for of in (self.counts, self.by))
        return Leading(keys, places, counts, by)

    def lying(self, first: Sequence[int]) -> Leading:
        """From column ``first`` of each sample on."""
        return replace(self, places=_places(first, self.counts, self.places.device))

    def moved(self, more: Sequence[int]) -> Leading:
        """Further, by ``more`` for each sample that has any."""
        return replace(self, by=tuple(by + (n if count else 0) for by, n, count in zip(self.by, more, self.counts)))

    def steps(self, device: torch.device) -> Tensor:
        """How far each entry has moved: ``[1, B, s]``."""
        return upload(self.by, device)[None, :, None].expand(-1, -1, self.places.shape[1])

    def write(self, keys: Tensor, steps: Tensor, turn: Turn) -> None:
        """Into the layer's ``keys`` ``[B, Hkv, n, d]``, moved by so many ``steps`` ``[1, B, s]``."""
        keys.scatter_(2, _at(self.places, keys), turn(self.keys, steps).to(keys.dtype))


def _places(first: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    width = max(1, *counts)
    return upload([[start + min(n, max(count - 1, 0)) for n in range(width)] for start, count in zip(first, counts)], device)


def _at(places: Tensor, keys: Tensor) -> Tensor:
    return places[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
