"""Keys and values as two thin factors each, shared by all heads; of what matters more, more of the rank is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.store import Turn
from foveate.ops.rebuilt import Rebuilt, selected
from foveate.ops.select import top_k

POWERS = 2
"""Power iterations of the randomised decomposition."""


def factorise(x: Tensor, rank: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """``x`` ``[B, T, n]`` as ``left @ right``: singular vectors times values ``[B, T, R]``, and ``[B, R, n]``.

    R is ``rank``, or T or n if they are less; the first r columns and rows make the approximation of rank r. Randomised (its
    random numbers are its own, from ``seed``) where the rank is less than half of n, exact otherwise; in float32 at least.
    Rows of zeros change nothing.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if 2 * rank >= x.shape[2]:  # whatever T is, so that a sample gets in a batch what it gets alone
        left, size, right = torch.linalg.svd(x, full_matrices=False)
    else:
        generator = torch.Generator().manual_seed(seed)  # of the host: every device gets the same numbers
        probe = upload(torch.randn(x.shape[2], rank, generator=generator), x.device, x.dtype)
        basis = torch.linalg.qr(x @ probe).Q
        for _ in range(POWERS):
            basis = torch.linalg.qr(x @ torch.linalg.qr(x.mT @ basis).Q).Q
        left, size, right = torch.linalg.svd(basis.mT @ x, full_matrices=False)
        left = basis @ left
    rank = min(rank, size.shape[1])
    return left[..., :rank] * size[:, None, :rank], right[:, :rank]


def joint(x: Tensor) -> Tensor:
    """``[B, T, Hkv * d]`` of ``[B, Hkv, T, d]``: the heads side by side."""
    return x.transpose(1, 2).flatten(2)


def parted(x: Tensor, heads: int) -> Tensor:
    """Back: ``[B, Hkv, T, d]`` of ``[B, T, Hkv * d]``, rows or components."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def moved(importance: Tensor, attention: Tensor, weight: float) -> Tensor:
    """Importance ``[B, T]`` once q queries more have come, given their ``attention`` ``[B, q, T]``: a running mean."""
    old = weight ** attention.shape[1]
    return old * importance + (1 - old) * attention.mean(1)


@dataclass(eq=False)
class Tiers:
    """Ranks that go by importance.

    Attributes:
        ranks: of each tier, falling.
        upto: ``[B, F - 1]`` how many entries the tiers up to each but the last have.
        most: the same of the sample with the most (on the host).
        importance: ``[B, T]`` float32, -inf where there is no entry.
        weight: of the past in the running mean that steps of decoding move the importance by; None = it stays.
    """

    ranks: tuple[int, ...]
    upto: Tensor
    most: tuple[int, ...]
    importance: Tensor
    weight: float | None

    @classmethod
    def of(
        cls, ranks: Sequence[int], shares: Sequence[float], counts: Sequence[int], importance: Tensor, weight: float | None
    ) -> Tiers:
        """Of ``counts[b]`` entries, the most important ``shares[0]`` in the first tier, the next ``shares[1]`` ..."""
        ends = [sum(shares[: tier + 1]) for tier in range(len(shares) - 1)]
        table = [[round(end * count) for end in ends] for count in counts]
        return cls(tuple(ranks), upload(table, importance.device), tuple(map(max, zip(*table))), importance, weight)

    @property
    def order(self) -> Tensor:
        """``[B, w]`` the entries that may be above the last tier, most important first."""
        return top_k(self.importance, self.most[-1])

    def cut(self, left: Tensor) -> Tensor:
        """``left`` ``[B, T, R]`` with zeros beyond the rank of each entry's tier."""
        order = self.order
        place = order.new_full(left.shape[:2], left.shape[1])
        place = place.scatter(1, order, torch.arange(order.shape[1], device=order.device).expand_as(order))
        rank = place.new_full((), self.ranks[-1])
        for tier, (high, low) in enumerate(zip(self.ranks, self.ranks[1:])):
            rank = rank + (high - low) * (place < self.upto[:, tier, None])
        return left.masked_fill(torch.arange(left.shape[2], device=left.device) >= rank[..., None], 0)

    def combine(self, weights: Tensor, left: Tensor) -> Tensor:
        """``weights @ self.cut(left)`` for ``weights`` ``[B, H, T]``; what is cut off is not computed."""
        order, parts = self.order, [weights @ left[..., : self.ranks[-1]]]
        for tier in reversed(range(len(self.most))):
            high, low, top = self.ranks[tier], self.ranks[tier + 1], order[:, : self.most[tier]]
            in_tier = torch.arange(top.shape[1], device=top.device) < self.upto[:, tier, None]
            mine = weights.gather(2, top[:, None].expand(-1, weights.shape[1], -1)) * in_tier[:, None]
            parts.append(mine @ left[..., low:high].gather(1, top[..., None].expand(-1, -1, high - low)))
        return torch.cat(parts, dim=-1)

    def batched(self, index: Tensor) -> Tiers:
        """With the batch entries ``index``."""
        index = index.to(self.upto.device)
        return replace(self, upto=self.upto[index], importance=self.importance[index])


@dataclass(eq=False)
class LowRank(Rebuilt):
    """Entries whose keys and values are factors of low rank, keys as they were before they were turned.

    Attributes:
        keys, values: ``[B, T, R]`` and ``[B, R, Hkv * d]`` each.
        heads: Hkv.
        positions: ``[R, B, T]`` rotary positions of the keys, int32.
        there: ``[B, T]`` bool: columns in use; None = all.
        tiers: ranks of values by importance; None = all of them whole.
    """

    keys: tuple[Tensor, Tensor]
    values: tuple[Tensor, Tensor]
    heads: int
    positions: Tensor
    there: Tensor | None = None
    tiers: Tiers | None = None

    @property
    def columns(self) -> int:
        """The T."""
        return self.keys[0].shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of factors, positions and importance."""
        parts: list[Tensor | None] = [*self.keys, *self.values, self.positions, self.there]
        parts += [] if self.tiers is None else [self.tiers.importance, self.tiers.upto]
        return sum(part.nbytes for part in parts if part is not None)

    def batched(self, index: Tensor) -> LowRank:
        """See `Store.batched`."""
        index = index.to(self.positions.device)
        return replace(
            self,
            keys=(self.keys[0][index], self.keys[1][index]),
            values=(self.values[0][index], self.values[1][index]),
            positions=self.positions.index_select(1, index),
            there=selected(self.there, index),
            tiers=None if self.tiers is None else self.tiers.batched(index),
        )

    def turned_keys(self, turn: Turn) -> Tensor:
        """``[B, Hkv, T, d]``."""
        return turn(parted(self.keys[0] @ self.keys[1], self.heads), self.positions)

    def rebuilt(self, turn: Turn) -> tuple[Tensor, Tensor]:
        """See `Rebuilt.rebuilt`."""
        left, right = self.values
        left = left if self.tiers is None else self.tiers.cut(left)
        return self.turned_keys(turn), parted(left @ right, self.heads)

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, allowed: Tensor | None, scale: float, turn: Turn
    ) -> Tensor:
        """See `Store.attend`. One query, a step of decoding, never sees rebuilt values, and moves the importance."""
        if query.shape[2] > 1:
            return super().attend(query, keys, values, allowed, scale, turn)
        batch, heads, _, width = query.shape
        folded = query.reshape(batch, self.heads, heads // self.heads, width)
        logits = folded @ torch.cat([self.turned_keys(turn), keys], dim=2).mT * scale
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(1, 2)[:, :, None]  # [B, H, 1, T + m]
        visible = self.visible(allowed, query, keys.shape[2])
        if visible is not None:
            logits = logits.masked_fill(~visible, float("-inf"))
        weights = logits.softmax(-1)[:, :, 0]
        read = weights.to(values.dtype)
        early, late = read[..., : self.columns], read[..., self.columns :]

        (left, right), tiers = self.values, self.tiers
        mixed = early @ left if tiers is None else tiers.combine(early, left)
        out = mixed.reshape(*folded.shape[:3], -1) @ parted(right, self.heads)
        out = out + late.reshape(*folded.shape[:3], keys.shape[2]) @ values
        if tiers is not None and tiers.weight is not None:
            shown = weights.detach()[..., : self.columns].mean(1, keepdim=True)
            tiers.importance = moved(tiers.importance, shown, tiers.weight)
        return out.to(query.dtype).reshape(*query.shape[:3], -1)
