"""What an encoder shows of the pictures of one call, recorded for methods and handed on by token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from foveate.core.companion import Companion
from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.reduction import Reduction
from foveate.core.signal import (
    Aligned,
    Attention,
    Columns,
    Features,
    Keys,
    Pixels,
    QueryKey,
    Signal,
    Summary,
    Values,
    follow,
    on,
)
from foveate.engine import attention, grids
from foveate.engine.clock import Clock
from foveate.engine.program import Program
from foveate.models.anatomy import Encoder, View
from foveate.ops.attention import row_logits

WHOLE = (QueryKey, Values)
"""Signals of all rows of a block, CLS included, and by head."""


class PictureSignals:
    """The signals of one call of the encoder.

    Attributes:
        kept_cells: numbers of the cells that were encoded, None where all were.
        summary: the summary rows beside the features ``[T, p, D]``, until the projector is through; if asked for.
        pixels: ``[P, C]`` of all cells, view after view, if somebody reads them.
    """

    def __init__(self, program: Program, views: Sequence[View], clock: Clock) -> None:
        self.program, self.clock = program, clock
        self.kept_cells: Tensor | None = None
        self.summary: Tensor | None = None
        self.pixels: Tensor | None = None
        self._views = views
        self._seen: dict[Signal, Any] = {}
        self._joined: dict[Signal, Any] = {}  # by token, while rows are tokens and the encoder's were cells
        self._by_view: dict[Signal, dict[int, Any]] = {}

    def __contains__(self, signal: Signal) -> bool:
        return signal in self._seen

    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        mask: Tensor | None,
        asking: Tensor | None = None,
    ) -> None:
        """What the attention of encoder block ``layer`` shows; packed encoders call once for each window.

        ``asking`` ``[T, n]`` (bool): queries that are no padding, None = all.
        """
        with self.clock.lap("encoder signals"):
            for signal in self.program.encoder_signals[layer]:
                made: Any
                if isinstance(signal, Columns):
                    made = attention.column_means(query, key, scale, mask, causal=False, asking=asking)
                elif isinstance(signal, QueryKey):
                    made = (query, key)
                elif isinstance(signal, Values):
                    made = value
                elif isinstance(signal, Keys):
                    made = key.float().mean(1)
                else:
                    made = _of_summary(query, key, scale, mask, asking)
                if self._encoder.packed:
                    self._seen.setdefault(signal, []).append(made)
                else:
                    self._seen[signal] = made

    def observe_features(self, x: Tensor, companion: Companion | None) -> None:
        """What the projector is fed."""
        packed = self._encoder.packed
        for signal in self.program.features:
            if isinstance(signal, Features):
                self._seen[signal] = [x] if packed else x
            elif companion is not None:
                with self.clock.lap("encoder signals"):
                    self._seen[signal] = [companion.align(x[None])[0]] if packed else companion.align(x)
        cells = self._views[0].cells if self._views and self._encoder.shuffled else None
        if cells is not None:
            readers = self.program.vision.get(("pre_projector", 0, "before"), ())
            read = {s: self._seen.get(s) for method in readers for s in self.program.reads[method]}
            self._joined = {s: grids.by_token(value, cells - cells.min()) for s, value in read.items() if value is not None}

    def forget_before(self, layer: int) -> None:
        """Let go of what nobody reads behind its own block."""
        for signal in self.program.passing:
            if signal.site.layer < layer:
                self._seen.pop(signal, None)

    def now(self, signal: Signal, prefix: int) -> Any:
        """A signal as a vision site gets it: by row; patches only, except for queries, keys and values."""
        if signal in self.program.given:
            return self.program.given[signal]
        if isinstance(signal, Summary):
            return self.summary
        value = self._joined.get(signal, self._seen.get(signal))
        return value if isinstance(signal, WHOLE) or value is None else grids.without_columns(value, prefix)

    def edit(self, reduction: Reduction) -> None:
        """Follow an edit of the encoder's rows."""
        self._seen = {signal: follow(value, reduction) for signal, value in self._seen.items()}
        self._joined = {signal: follow(value, reduction) for signal, value in self._joined.items()}

    def drop_summary(self, prefix: int, layout: Layout | None) -> None:
        """Drop summary columns, which nobody asks for behind the encoder; queries, keys and values keep them, in front.

        ``layout`` is that of the rows, None where summary rows are the first.
        """
        if layout is None:
            self._seen = {signal: self.now(signal, prefix) for signal in self._seen}
            return
        patches = grids.patch_rows(layout, prefix)
        order = torch.cat([grids.summary_rows(layout, prefix).anchor, patches.anchor], dim=1)
        whole = Reduction.gather(order, patches.inputs)
        self._seen = {
            signal: follow(value, whole if isinstance(signal, WHOLE) else patches) for signal, value in self._seen.items()
        }

    def refill(self, layout: Layout, rows: int, device: torch.device) -> None:
        """Back to the full grid of ``rows``, of what is about the rows of ``layout``."""
        for signal, value in on(self._seen, device).items():
            if not isinstance(signal, WHOLE) and grids.length(value) == layout.shape[1]:
                self._seen[signal] = grids.dense_signal(value, layout, rows)

    def settle(self, bound: Mapping[str, Any]) -> None:
        """Lay the calls of a packed encoder end to end, in the order of its input."""
        self._joined = {}
        if not self.program.anatomy.towers or not self._encoder.packed:
            return
        order = self._encoder.order(bound, 0)
        for signal, calls in self._seen.items():
            if isinstance(signal, Columns | Keys):
                rows = torch.cat([call.flatten(0, 1) for call in calls])
            elif isinstance(signal, Features | Aligned):
                rows = calls[0]
            else:
                continue
            self._seen[signal] = self._in_order(rows, order)

    def gather(self, signal: Signal, views: Sequence[int], ordinal: Tensor) -> Any:
        """A signal of the tokens ``ordinal`` ``[I, n]`` of some views of one grid, by token: ``[I, n, ...]``."""
        edited = self._by_view.get(signal, {})
        if any(view in edited for view in views):
            value: Any = [edited.get(view, self._of_view(signal, view)) for view in views]
            if isinstance(value[0], Attention):
                value = Attention(torch.stack([v.logits for v in value]), torch.stack([v.lse for v in value]))
            else:
                value = torch.stack(value)
        else:
            value = self._of_views(signal, views)
        value = on(value, ordinal.device)
        if isinstance(value, Attention):
            index = ordinal[:, None, None].expand(-1, *value.logits.shape[1:3], -1)
            return Attention(value.logits.gather(3, index), value.lse)
        index = ordinal.reshape(*ordinal.shape, *[1] * (value.ndim - 2)).expand(*ordinal.shape, *value.shape[2:])
        return value.gather(1, index)

    def edited(self, members: Sequence[int], ordinal: Tensor, reduction: Reduction, after: Layout, total: int) -> None:
        """Views ``members`` were edited behind the projector: of their tokens ``ordinal``, what ``after`` says lives on."""
        for signal in self._seen:
            if isinstance(signal, WHOLE) or signal not in self.program.signals_by_item:
                continue
            value = follow(self.gather(signal, members, ordinal), reduction)
            full = grids.dense_signal(value, after, total)
            store = self._by_view.setdefault(signal, {})
            for place, number in enumerate(members):
                store[number] = _one(full, place)

    @property
    def _encoder(self) -> Encoder:
        return self.program.anatomy.towers[0]  # several are alike in what is asked here

    def _in_order(self, rows: Tensor, order: Tensor | None) -> Tensor:
        """Rows ``[P, ...]`` of a packed encoder in the order of its input; those of cells that were not encoded are zero."""
        cells = [view.cells for view in self._views if view.cells is not None]
        total, group = sum(c.numel() for c in cells), cells[0].shape[1]
        place = torch.arange(total, device=rows.device) if order is None else upload(order, rows.device)
        if self.kept_cells is not None:
            kept = self.kept_cells.to(rows.device)
            encoded = torch.zeros(total // group, dtype=torch.bool, device=rows.device).index_fill(0, kept, True)
            place = place[encoded[place // group]]
        elif order is None:
            return rows
        return rows.new_zeros(total, *rows.shape[1:]).index_copy(0, place, rows)

    def _of_view(self, signal: Signal, view: int) -> Any:
        return _one(self._of_views(signal, [view]), 0)

    def _of_views(self, signal: Signal, views: Sequence[int]) -> Any:
        """By token of the full grid: ``[I, count, ...]``, the mean over the patches of each token, or all of them."""
        if isinstance(signal, Pixels) and self.pixels is not None:
            of_view = self.pixels.split([view.rows * view.columns for view in self._views])
            return torch.stack([of_view[view] for view in views])
        fed = isinstance(signal, Features | Aligned) and not self._encoder.packed
        cells = [self._encoder.fed(self._views[view]) if fed else self._views[view].cells for view in views]
        known = [c for c in cells if c is not None]
        if len(known) < len(cells):
            family = self.program.anatomy.family
            raise FoveateError(f"{family}: encoder signals cannot be told apart by token for this input")
        value = self._seen[signal]
        if isinstance(signal, Features) and signal.cells:
            # A token that is a cell is as good as one between so many copies of it.
            most = max(c.shape[1] for c in known)
            every = upload(torch.stack([c.repeat(1, most // c.shape[1]) for c in known]), value.device)
            return (value if self._encoder.packed else value.flatten(0, 1))[every].flatten(2)
        if len({c.shape[1] for c in known}) > 1:
            apart = [self._of_views(signal, [view]) for view in views]
            if isinstance(value, Attention):
                return Attention(torch.cat([a.logits for a in apart]), torch.cat([a.lse for a in apart]))
            return torch.cat(apart)
        index = torch.stack(known)
        if isinstance(value, Attention):
            # Logits relative to their row's log-sum-exp: each tile has its own.
            logits = (value.logits - value.lse[..., None]).permute(0, 3, 1, 2).flatten(0, 1)
            logits = logits[upload(index, logits.device)].logsumexp(2) - math.log(index.shape[2])
            return Attention(logits.permute(0, 2, 3, 1), logits.new_zeros(logits.shape[0], *logits.shape[2:]))
        flat = value if self._encoder.packed else value.flatten(0, 1)
        index = upload(index, flat.device)
        return flat[index[..., 0]] if index.shape[2] == 1 else flat[index].mean(2)


def _of_summary(query: Tensor, key: Tensor, scale: float, mask: Tensor | None, asking: Tensor | None) -> Attention:
    """Attention of the first summary row: the first row, unless padding (not ``asking``) stands before it."""
    first = query.new_zeros(len(query), 1, dtype=torch.long) if asking is None else asking.int().argmax(1, keepdim=True)
    chosen = query.gather(2, first[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
    logits = row_logits(chosen, key, scale)
    if mask is not None:
        logits = logits.masked_fill(~attention.visible(mask, first, query.shape[2], key.shape[2]), float("-inf"))
    return Attention(logits, logits.logsumexp(-1))


def _one(value: Any, place: int) -> Any:
    """One picture's part of a signal ``[I, ...]``."""
    return Attention(value.logits[place], value.lse[place]) if isinstance(value, Attention) else value[place]


def joined(parts: Sequence[Any], places: Sequence[int]) -> Any:
    """A signal ``[I, ...]`` in one piece; ``places`` says where each picture of the ``parts``, taken in turn, belongs."""
    order = sorted(range(len(places)), key=places.__getitem__)
    if isinstance(parts[0], Attention):
        return Attention(*(torch.cat(of)[order] for of in zip(*((part.logits, part.lse) for part in parts))))
    return torch.cat(list(parts))[order]
