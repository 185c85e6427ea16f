"""Which tokens of a conversation the entries of a cache layer are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import FoveateError


@dataclass(frozen=True, eq=False)
class Ledger:
    """Which tokens of the conversation the entries of a cache layer are.

    Entries are those of ``prefix``, then ``tail`` consecutive tokens from number ``start`` on.

    Attributes:
        prefix: ``[B, 1 or Hkv, n]`` token numbers, -1 = padding; None where nothing was ever removed.
        start: number of the first token of the tail.
        tail: entries in the tail.
        holes: whether the prefix has padding.
        shift: ``[B]`` by how much later tokens move down in rotary position, None = not at all.
        stored: how many of the prefix' columns, the first ones, are in a store instead of in the dense tensors.
        visual: ``[B, L]`` bool: which of the first L tokens of the conversation are visual, None = none.
    """

    prefix: Tensor | None = None
    start: int = 0
    tail: int = 0
    holes: bool = False
    shift: Tensor | None = None
    stored: int = 0
    visual: Tensor | None = None

    @property
    def past(self) -> int:
        """Tokens that the layer has been shown."""
        return self.start + self.tail

    @property
    def consecutive(self) -> bool:
        """Whether the entries are consecutive tokens, as in a plain cache."""
        return self.prefix is None

    @property
    def complete(self) -> bool:
        """Whether every token that was shown is there."""
        return self.consecutive and self.start == 0

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for ledgers that say the same of layers that went through the same edits."""
        return (id(self.prefix), self.start, self.tail, self.holes, id(self.shift), self.stored, id(self.visual))

    def tokens(self, batch: int, device: torch.device) -> Tensor:
        """``[B, 1 or Hkv, n]`` token numbers of all entries."""
        tail = torch.arange(self.start, self.past, device=device)
        if self.prefix is None:
            return tail.expand(batch, 1, -1)
        return torch.cat([self.prefix.to(device), tail.expand(*self.prefix.shape[:2], -1)], dim=-1)

    def dense(self, batch: int, device: torch.device) -> Tensor:
        """`tokens` of the entries in dense tensors; what lies in a store is read there, by every query."""
        tokens = self.tokens(batch, device)
        return tokens[:, :1, self.stored :] if self.stored else tokens

    def is_visual(self, tokens: Tensor) -> Tensor:
        """Which of ``tokens`` ``[B, h, n]`` are visual."""
        if self.visual is None or not self.visual.shape[1]:
            return torch.zeros_like(tokens, dtype=torch.bool)
        visual = self.visual.to(tokens.device)[:, None].expand(-1, tokens.shape[1], -1)
        known = (tokens >= 0) & (tokens < visual.shape[2])
        return known & visual.gather(2, tokens.clamp(0, visual.shape[2] - 1))

    def extended(self, count: int) -> Ledger:
        """With the next ``count`` tokens."""
        return replace(self, tail=self.tail + count)

    def appended(self, tokens: Tensor, past: int, holes: bool, shift: Tensor | None) -> Ledger:
        """With the entries ``tokens`` ``[B, n]`` (-1 = padding) out of those up to number ``past``."""
        old = self.tokens(tokens.shape[0], tokens.device)
        new = tokens[:, None].expand(-1, old.shape[1], -1)
        prefix = torch.cat([old, new], dim=-1)
        return replace(self, prefix=prefix, start=past, tail=0, holes=self.holes or holes, shift=shift)

    def kept(self, entries: Tensor, holes: bool) -> Ledger:
        """With the entries ``[B, Hkv or 1, k]`` only (-1 = padding, if there are ``holes``), and what lies in a store."""
        tokens = self.tokens(entries.shape[0], entries.device)
        if self.stored:
            early = torch.arange(self.stored, device=entries.device).expand(*entries.shape[:2], -1)
            entries = torch.cat([early, torch.where(entries >= 0, entries + self.stored, -1)], dim=-1)
        heads = max(tokens.shape[1], entries.shape[1])
        entries = entries.expand(-1, heads, -1)
        prefix = tokens.expand(-1, heads, -1).gather(2, entries.clamp(min=0)).masked_fill(entries < 0, -1)
        return replace(self, prefix=prefix, start=self.past, tail=0, holes=holes)

    def packed(self, entries: Tensor, rest: Tensor, holes: bool) -> Ledger:
        """With the ``entries`` ``[B, Hkv or 1, n]``, which go to a store, and the ``rest`` only.

        That has padding, if there are ``holes``. Nothing is in a store yet.
        """
        heads = max(entries.shape[1], rest.shape[1])
        kept = torch.cat([part.expand(-1, heads, -1) for part in (entries, rest)], dim=-1)
        return replace(self.kept(kept, holes), stored=entries.shape[2])

    def last(self, count: int) -> Ledger:
        """With the last ``count`` entries only."""
        if count <= self.tail:
            return replace(self, prefix=None, start=self.past - count, tail=count, holes=False)
        if self.prefix is None:
            return self
        return replace(self, prefix=self.prefix[..., -(count - self.tail) :])

    def cropped(self, count: int) -> Ledger:
        """Without the last ``count`` tokens."""
        if count > self.tail:
            raise FoveateError(f"crop({count}): only the {self.tail} tokens after the compressed prompt can be taken back")
        return replace(self, tail=self.tail - count)

    def batched(self, index: Tensor) -> Ledger:
        """With the batch entries ``index``."""

        def chosen(of: Tensor | None) -> Tensor | None:
            return None if of is None else of.index_select(0, index.to(of.device))

        return replace(self, prefix=chosen(self.prefix), shift=chosen(self.shift), visual=chosen(self.visual))


EMPTY = Ledger()
