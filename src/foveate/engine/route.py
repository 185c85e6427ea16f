"""The rows of one decoder layer, parted into active ones and others."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.method import Plan
from foveate.core.reduction import Reduction
from foveate.engine.cache import FoveateLayer
from foveate.engine.ledger import Ledger
from foveate.engine.rows import Rows


class Route:
    """Rows of one layer, parted into active ones and others.

    Attributes:
        x: all rows, as they entered.
        plan: what said so.
        active, frozen: the rows of each part.
        counts: active rows of each sample.
        spread: active rows to their places in the sequence; the others are zero.
        restore: from the order of the cache (frozen, then active; or active only) back to the order of the sequence.
    """

    def __init__(self, x: Tensor, layout: Layout, plan: Plan) -> None:
        self.x = x
        self.plan = plan
        # Padding rows are neither: they pass through and write no entry that is ever read.
        live = plan.active & layout.valid
        self.counts = plan.counts or tuple(live.sum(1).tolist())
        rest = tuple(n - active for n, active in zip(layout.live, self.counts))
        self.active = Reduction.keeping(live, self.counts)
        self.frozen = Reduction.keeping(~plan.active & layout.valid, rest)
        self.spread = self.restore = _inverse(self.active.anchor, layout.shape[1], -1)
        if plan.frozen:  # padding rows read column 0
            self.restore = _inverse(torch.cat([self.frozen.anchor, self.active.anchor], dim=1), layout.shape[1], 0)

    @property
    def skips(self) -> bool:
        """Whether the other rows have no entries in this layer."""
        return not self.plan.frozen

    def enter(
        self, layer: int, rows: Rows, cache: FoveateLayer, base: Tensor | None, rope: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, ...]]:
        """Active rows, their mask and their rotary tables; frozen rows' keys and values go into the cache here.

        ``base`` is the model's own mask and ``rope`` the tables of all rows.
        """
        x, old, tokens = self.x, cache.ledger, rows.tokens
        tables = [table.to(x.device).expand(x.shape[0], -1, -1) for table in rope]
        mine = self.active.take(tokens).masked_fill(~self.active.valid, -1)
        tables_of_active = tuple(self.active.take(table) for table in tables)
        active = self.active.take(x)
        if self.skips:
            new = self._skipped(old, rows, mine)
            cache.announce(new, active.shape[1])
            return active, rows.mask(base, new, active, mine), tables_of_active

        new = rows.extended(old)
        others = tuple(self.frozen.take(table) for table in tables)
        with rows.said(self.frozen):
            cache.update(*rows.anatomy.keys_values(layer, self.frozen.take(x), others))  # type: ignore[arg-type]
        cache.announce(new, active.shape[1])
        rest = self.frozen.take(tokens).masked_fill(~self.frozen.valid, -1)
        past = old.dense(x.shape[0], x.device)
        keys = torch.cat([past, *(n[:, None].expand(-1, past.shape[1], -1) for n in (rest, mine))], dim=-1)
        return active, rows.pick(base, mine, keys, x), tables_of_active

    def leave(self, cache: FoveateLayer, x: Tensor) -> Tensor:
        """The active rows ``x`` back among the others, and frozen rows' entries in the order of the sequence."""
        if not self.skips:
            index = self.restore.anchor
            past = cache.keys.shape[2] - self.restore.inputs

            def in_order(stored: Tensor) -> Tensor:
                rows = (index + past)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
                new = stored.gather(2, rows)
                return torch.cat([stored[:, :, :past], new], dim=2) if past else new

            ledger = cache.ledger
            cache.keys, cache.values = in_order(cache.keys), in_order(cache.values)
            cache.ledger = ledger  # without the padding between both parts
        rows = self.x.shape[1]
        out = torch.cat([self.x, self.x[:, :1]], dim=1)
        index = self.active.anchor.masked_fill(~self.active.valid, rows)
        return out.scatter(1, index[..., None].expand_as(x), x)[:, :rows]

    def _skipped(self, old: Ledger, rows: Rows, mine: Tensor) -> Ledger:
        return rows.marked(old).appended(mine, rows.past + rows.given, len(set(self.counts)) > 1, rows.moved(old))


def _inverse(order: Tensor, rows: int, missing: int) -> Reduction:
    """Puts back what was gathered by ``order`` ``[B, n]`` (-1 = padding); other rows read column ``missing`` (-1 = zero)."""
    # Padding columns write to a spare row.
    where = order.new_full((order.shape[0], rows + 1), missing)
    column = torch.arange(order.shape[1], device=order.device).expand_as(order)
    where.scatter_(1, order.masked_fill(order < 0, rows), column)
    return Reduction.gather(where[:, :rows], order.shape[1])


def behind(reduction: Reduction, past: int) -> Reduction:
    """A reduction of the current rows as one of a layer's entries, which are ``past`` earlier ones and these."""
    earlier = torch.arange(past, device=reduction.anchor.device).expand(reduction.shape[0], -1)
    anchor = torch.where(reduction.valid, reduction.anchor + past, -1)
    return Reduction.gather(torch.cat([earlier, anchor], dim=1), past + reduction.inputs)
