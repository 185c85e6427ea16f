"""What each method saw and did, where a session was told to remember it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.method import Method
from foveate.core.reduction import Reduction
from foveate.core.signal import Site


@dataclass(frozen=True)
class Step:
    """One thing that a method did.

    Attributes:
        method: who.
        site: where; a route is a decoder layer's, and so is what was scored or viewed in its cache.
        act: rows were dropped or merged, were told which layers to run through, or cached entries were chosen.
        before, after: the rows that it saw, and those that went on.
        reduction: of an edit.
        scores: ``[B, N]`` each: what it ranked the rows by, one for each ranking; nan where a row had none.
        places: at vision sites, for each grid (by its number among all that the encoder was shown): where its tokens stand,
            as row of the batch and raster index there, each ``[count]`` on the host.
    """

    method: Method
    site: Site
    act: Literal["edit", "route", "cache"]
    before: Layout
    after: Layout
    reduction: Reduction | None = None
    scores: tuple[Tensor, ...] = ()
    places: Mapping[int, tuple[Tensor, Tensor]] | None = None


@dataclass(frozen=True)
class Held:
    """What a decoder layer's cache holds once a prompt was read.

    Attributes:
        layout: the rows that the prompt with the pictures wrote.
        tokens: ``[B, 1 or Hkv, n]`` token numbers of the entries, -1 = padding.
        read: those of them that decoding reads.
    """

    layout: Layout
    tokens: Tensor
    read: Tensor
