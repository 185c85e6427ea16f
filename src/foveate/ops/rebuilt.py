"""Stores that make keys and values anew for each attention: of one layer at a time, and gone when it is done."""

from __future__ import annotations

from abc import abstractmethod

import torch
from torch import Tensor

from foveate.core.store import Store, Turn
from foveate.ops.attention import CHUNK, row_logits


class Rebuilt(Store):
    """A store whose heads hold the same entries, ``n`` columns of each sample.

    Attributes:
        there: ``[B, n]`` bool: columns in use; None = all.
    """

    there: Tensor | None

    @abstractmethod
    def rebuilt(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, Hkv, n, d]`` as attention reads them now."""

    @property
    @abstractmethod
    def columns(self) -> int:
        """The n."""

    @property
    def held(self) -> float:
        """Entries of a sample, on average."""
        return float(self.columns) if self.there is None else float(self.there.sum()) / len(self.there)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float, turn: Turn
    ) -> Tensor:
        """See `Store.attend`."""
        early, mine = self.rebuilt(turn)
        return torch.nn.functional.scaled_dot_product_attention(
            query,
            torch.cat([early, keys], dim=2),
            torch.cat([mine, values], dim=2),
            attn_mask=self.visible(allowed, query, keys.shape[2]),
            scale=scale,
            enable_gqa=query.shape[1] != keys.shape[1],
        )

    def log_mass(self, query: Tensor, scale: float, turn: Turn) -> Tensor:
        """See `Store.log_mass`."""
        keys = self.rebuilt(turn)[0].float()
        gone = None if self.there is None else ~self.there[:, None, None]
        found = []
        for start in range(0, query.shape[2], CHUNK):
            logits = row_logits(query[:, :, start : start + CHUNK], keys, scale)
            found.append((logits if gone is None else logits.masked_fill_(gone, float("-inf"))).logsumexp(-1))
        return torch.cat(found, dim=2)

    def visible(self, allowed: Tensor | None, query: Tensor, later: int) -> Tensor | None:
        """``[B, 1 or H, q, n + m]`` bool: which entries a query sees, given the m later ones ``allowed``; None = all."""
        if allowed is None and self.there is None:
            return None
        batch, _, rows, _ = query.shape
        if allowed is None:
            allowed = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device).expand(batch, 1, rows, later)
        there = allowed.new_ones(1, self.columns) if self.there is None else self.there
        early = there[:, None, None].expand(batch, allowed.shape[1], rows, -1)
        return torch.cat([early, allowed.expand(batch, -1, -1, -1)], dim=-1)


def chosen(x: Tensor, entries: Tensor) -> Tensor:
    """``[B, Hkv, k, d]``: the ``entries`` ``[B, k]`` of ``x`` ``[B, Hkv, n, d]``; zeros where one is -1."""
    index = entries.clamp(min=0)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).masked_fill((entries < 0)[:, None, :, None], 0)


def selected(x: Tensor | None, index: Tensor, dim: int = 0) -> Tensor | None:
    """The batch entries ``index``, where there is anything."""
    return None if x is None else x.index_select(dim, index.to(x.device))
