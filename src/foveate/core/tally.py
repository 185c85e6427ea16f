"""What cached entries have received of later queries' attention, by which one of each head goes with every step."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tally:
    """Attention that the entries of one layer have received so far; the choice of the one that goes is the device's.

    All heads of a sample hold as many entries, and what comes takes the place of what goes. A tally is data, like a store:
    it is reordered, copied and saved with its cache.

    Attributes:
        received: ``[B, Hkv, n]`` float32: sums over queries of the mean over a key-value head's query heads.
        recent: ``[B, 1, 1]`` how many of the newest tokens, the coming one among them, stay (padding between turns counts).
    """

    received: Tensor
    recent: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of all that it holds."""
        return self.received.nbytes + self.recent.nbytes

    def batched(self, index: Tensor) -> Tally:
        """With the batch entries ``index`` ``[B']``, possibly repeated."""
        return Tally(*(part.index_select(0, index.to(part.device)) for part in (self.received, self.recent)))

    def evicting(self, tokens: Tensor, coming: int) -> tuple[Tensor, Tally]:
        """Where in each head the token of number ``coming`` goes, ``[B, Hkv]``, and the tally once it is there.

        Args:
            tokens: ``[B, 1 or Hkv, n]`` number of each entry's token, -1 = padding.
            coming: number of the next token.
        """
        received = self._over(tokens.shape[-1])
        stays = (tokens < 0) | (tokens > coming - self.recent)
        places = received.masked_fill(stays, float("inf")).argmin(-1, keepdim=True)
        return places[..., 0], replace(self, received=received.scatter(-1, places, 0.0))

    def seen(self, query: Tensor, keys: Tensor, allowed: Tensor | None, scale: float) -> Tally:
        """With the attention that some rows give to all entries.

        Args:
            query: ``[B, H, q, d]``; chunks of long ones are up to the caller.
            keys: ``[B, Hkv, n, d]``.
            allowed: ``[B, 1 or H, q, n]`` bool, which entries a query sees, None = all; one that sees none gives nothing.
            scale: factor of the logits.
        """
        batch, heads, rows, width = query.shape
        kv_heads, entries = keys.shape[1:3]
        logits = (query.reshape(batch, kv_heads, -1, width) @ keys.mT).float() * scale
        if allowed is not None:
            visible = allowed.expand(batch, heads, rows, entries).reshape(logits.shape)
            logits = logits.masked_fill(~visible, torch.finfo(logits.dtype).min)
        attention = logits.softmax(-1)
        if allowed is not None:
            attention = attention * visible
        # The mean over query heads, the sum over rows.
        return replace(self, received=self._over(entries) + attention.sum(2) * (kv_heads / heads))

    def _over(self, entries: int) -> Tensor:
        """What so many entries received: nothing those that came since, and what was taken back is gone."""
        missing = entries - self.received.shape[-1]
        return torch.nn.functional.pad(self.received, (0, missing)) if missing else self.received
