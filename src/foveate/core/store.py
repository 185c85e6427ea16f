"""What the owner of the cache makes of a layer's entries: some go, some stay as they are, some go on in a store."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from torch import Tensor

Turn = Callable[[Tensor, Tensor], Tensor]
"""Turns keys ``[B, Hkv, n, d]`` to rotary ``positions [R, B, n]`` as the layer does it (see `Function` ``rotate``)."""


class Store(ABC):
    """Cached entries of one layer in a form of their own, all of which every later query sees.

    Later entries are dense tensors beside it. A store is data: it is copied, saved and loaded with its cache, and is handed
    what it needs of the model. What leaves a cache (`crop`) is never in a store.
    """

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes of all that it holds."""

    @property
    @abstractmethod
    def held(self) -> float:
        """Entries, on average over samples and heads (may be read from the device)."""

    @abstractmethod
    def batched(self, index: Tensor) -> Self:
        """With the batch entries ``index`` ``[B']``, possibly repeated."""

    @abstractmethod
    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float, turn: Turn
    ) -> Tensor:
        """Attention over its entries and over later dense ones.

        Args:
            query: ``[B, H, q, d]``.
            keys, values: ``[B, Hkv, m, d]`` later entries.
            allowed: ``[B, 1 or H, q, m]`` bool, which later entries a query sees; None = all.
            scale: factor of the logits.
            turn: the layer's rotation.

        Returns:
            ``[B, H, q, d]`` in the query's dtype.
        """

    @abstractmethod
    def log_mass(self, query: Tensor, scale: float, turn: Turn) -> Tensor:
        """Log-sum-exp of the logits of ``query`` ``[B, H, q, d]`` over its entries: ``[B, H, q]`` float32."""


@dataclass(frozen=True)
class Kept:
    """Cached entries that live on in a layer.

    Attributes:
        entries: ``[B, Hkv or 1, k]`` ascending; where there are fewer, padded with -1.
        counts: entries of each sample, where they are not those of its rows; the same for all heads.
        by_head: entries of each head of each sample, where heads keep different numbers: they are then stored by head,
            without the padding.
    """

    entries: Tensor
    counts: tuple[int, ...] | None = None
    by_head: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True)
class Packed:
    """A layer's entries, some of which go on in a store; what is neither in it nor among the ``rest`` is gone.

    Attributes:
        store: made of the layer's keys and values.
        entries: ``[B, 1 or Hkv, n]`` which entries it holds, in its own order; -1 = none.
        rest: ``[B, 1 or Hkv, k]`` those that stay as they are, ascending, padded with -1 on the left.
        counts: how many of each sample stay so.
    """

    store: Store
    entries: Tensor
    rest: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Entries:
    """What a layer's cache holds, the current rows included.

    Attributes:
        tokens: ``[B, 1 or Hkv, n]`` number of each entry's token in the conversation, -1 = padding.
        visual: ``[B, 1 or Hkv, n]`` bool.
        counts: visual entries of each sample, on the host.
    """

    tokens: Tensor
    visual: Tensor
    counts: tuple[int, ...]
