"""What a method does with a stream: pictures that keep coming, read chunk by chunk onto one cache."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from foveate.core.method import Cache

Turned = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""``(layer, keys [1, Hkv, n, d], old, new)``: a layer's keys, moved from positions ``old`` ``[R, n]`` to ``new``."""


@dataclass(frozen=True)
class Held:
    """What a decoder layer's cache holds of a stream.

    Attributes:
        keys, values: ``[1, Hkv, n, d]``, keys turned to their positions.
        positions: ``[R, n]`` rotary positions.
        prefix: entries of what was told before the first picture.
        attention: for each text of `Bounded.guidance`, ``[n]`` float32: the mean over its words and the heads.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    prefix: int
    attention: tuple[Tensor, ...] = ()


class Bounded(Cache):
    """Keeps the cache of a stream within bounds, however long it runs."""

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Entries of a layer, the prefix not counted, from which on `retain` is asked what stays."""

    @abstractmethod
    def guidance(self, said: tuple[str, str] | None) -> tuple[str, ...]:
        """Texts that the model reads over the cache, and forgets, before `retain`; ``said``: last question and answer."""

    @abstractmethod
    def retain(self, held: Sequence[Held], turned: Turned, limit: int | None) -> list[Held]:
        """What stays in each layer.

        Args:
            held: by decoder layer.
            turned: gives keys another position.
            limit: positions that the model knows, None = unknown.
        """
