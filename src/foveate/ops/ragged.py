"""Keys and values of heads that keep different numbers of entries: stored in small blocks, attended to without padding.

A dense tensor would pad every head to the longest one. Here each head's entries fill blocks of ``SIZE``; only the last block
of a head has room to spare.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.store import Store, Turn

SIZE = 32


@dataclass(frozen=True)
class Blocks(Store):
    """Entries of ``B * Hkv`` heads.

    Attributes:
        keys, values: ``[n, SIZE, d]``.
        there: ``[n, SIZE]`` bool: slots in use.
        owner: ``[n]`` head (``b * Hkv + h``) that each block belongs to, ascending.
        heads: ``(B, Hkv)``.
    """

    keys: Tensor
    values: Tensor
    there: Tensor
    owner: Tensor
    heads: tuple[int, int]

    @classmethod
    def of(cls, keys: Tensor, values: Tensor, entries: Tensor, counts: Sequence[Sequence[int]]) -> Blocks:
        """The ``entries`` ``[B, Hkv, k]`` (-1 = none) of dense ``keys`` and ``values`` ``[B, Hkv, n, d]``.

        ``counts[b][h]`` of them are not -1.
        """
        batch, heads, width = entries.shape
        spare = -width % SIZE
        # Entries first, padding last, so that a head's blocks fill up from the front.
        padding_last = entries.masked_fill(entries < 0, torch.iinfo(entries.dtype).max).sort(dim=-1).values
        index = torch.nn.functional.pad(padding_last.masked_fill(padding_last >= keys.shape[2], -1), (0, spare), value=-1)
        filled = [-(-count // SIZE) for sample in counts for count in sample]
        owner = upload([head for head, blocks in enumerate(filled) for _ in range(blocks)], keys.device, torch.long)
        number = upload([block for blocks in filled for block in range(blocks)], keys.device, torch.long)
        chosen = index.reshape(batch * heads, -1, SIZE)[owner, number]
        flat = (owner[:, None] * keys.shape[2] + chosen.clamp(min=0)).flatten()

        def stored(x: Tensor) -> Tensor:
            return x.reshape(-1, x.shape[-1]).index_select(0, flat).reshape(*chosen.shape, -1)

        return cls(stored(keys), stored(values), chosen >= 0, owner, (batch, heads))

    @cached_property
    def bias(self) -> Tensor:
        """``[n, 1, SIZE]`` added to logits: -inf where a slot is not in use."""
        return self.keys.new_zeros(self.there.shape).masked_fill(~self.there, float("-inf"))[:, None]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return self.keys.nbytes + self.values.nbytes

    @property
    def held(self) -> float:
        """Entries of a head, on average."""
        batch, heads = self.heads
        return float(self.there.sum()) / (batch * heads)

    def batched(self, index: Tensor) -> Blocks:
        """With the batch entries ``index`` ``[B']``, possibly repeated."""
        _, heads = self.heads
        chosen = (index.to(self.owner.device)[:, None] * heads + torch.arange(heads, device=self.owner.device)).flatten()
        head, block = (self.owner == chosen[:, None]).nonzero(as_tuple=True)
        moved = {name: getattr(self, name)[block] for name in ("keys", "values", "there")}
        return replace(self, **moved, owner=head, heads=(len(index), heads))

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float, turn: Turn
    ) -> Tensor:
        """See `Store.attend`; softmax and sums in float32."""
        batch, heads, rows, width = query.shape
        kv_heads = keys.shape[1]
        group = heads // kv_heads
        keys, values = keys.flatten(0, 1), values.flatten(0, 1)
        # Few and large operations: this runs in every layer of every step.
        early = self._logits(query, scale)
        folded = query.reshape(batch * kv_heads, group * rows, width)
        late = torch.baddbmm(folded.new_zeros(()), folded, keys.mT, alpha=scale).float()  # [B Hkv, g, m]
        if allowed is not None:
            visible = allowed.expand(batch, heads, rows, -1).reshape(late.shape)
            late = late.masked_fill(~visible, float("-inf"))

        top = late.amax(-1) if late.shape[-1] else late.new_full(late.shape[:-1], float("-inf"))
        largest = early.amax(-1)
        top = top.scatter_reduce(0, self.owner[:, None].expand_as(largest), largest, "amax")[..., None]
        early, late = (early - top.index_select(0, self.owner)).exp(), (late - top).exp()
        total = late.sum(-1, keepdim=True).index_add(0, self.owner, early.sum(-1, keepdim=True))
        out = (late.to(values.dtype) @ values).float()
        out = out.index_add(0, self.owner, (early.to(values.dtype) @ self.values).float())
        return (out / total).to(query.dtype).reshape(batch, heads, rows, width)

    def log_mass(self, query: Tensor, scale: float, turn: Turn) -> Tensor:
        """See `Store.log_mass`."""
        by_block = self._logits(query, scale).logsumexp(-1)  # [n, g]
        batch, kv_heads = self.heads
        nothing = by_block.new_full((batch * kv_heads, by_block.shape[1]), float("-inf"))
        top = nothing.scatter_reduce(0, self.owner[:, None].expand_as(by_block), by_block, "amax")
        total = torch.zeros_like(top).index_add(0, self.owner, (by_block - top[self.owner]).exp())
        return (top + total.log()).reshape(query.shape[:3])

    def _logits(self, query: Tensor, scale: float) -> Tensor:
        """``[n, g, SIZE]`` logits of the g queries that share each block's head; slots that are not in use at -inf."""
        batch, kv_heads = self.heads
        folded = query.reshape(batch * kv_heads, -1, query.shape[-1])
        return torch.baddbmm(self.bias, folded.index_select(0, self.owner), self.keys.mT, alpha=scale).float()
