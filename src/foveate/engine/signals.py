"""What methods asked to see of the language model, recorded layer by layer in one forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.method import Method
from foveate.core.reduction import Reduction
from foveate.core.roles import last_of
from foveate.core.signal import Attention, Halves, Hidden, Ids, KeyValue, QueryKey, Rows, Signal, Site, follow, on
from foveate.core.store import Turn
from foveate.engine import attention
from foveate.engine.cache import FoveateLayer
from foveate.engine.program import Program
from foveate.engine.route import Route, behind
from foveate.engine.rows import Rows as Alive

Gather = Callable[[Signal, Sequence[int], Tensor], Any]
"""An encoder signal of the tokens ``ordinal`` ``[I, n]`` of grids of one shape, by their numbers in the prompt."""


class Signals:
    """What one forward has shown so far.

    Attributes:
        seen: by the signal that asked for it.
        whole: whether the owner of the cache sees attention over all entries, not only over the current rows.
    """

    def __init__(self, program: Program, rows: Alive, whole: bool) -> None:
        self.program, self.whole = program, whole
        self.seen: dict[Signal, Any] = dict(program.given)
        self._rows = rows
        if program.asks_ids:
            if rows.intake.ids is None:
                raise FoveateError("inputs_embeds: this recipe needs input_ids in steps of decoding, too; generate from ids")
            self.seen[Ids()] = upload(rows.intake.ids, rows.device)

    def read(self, method: Method) -> dict[Signal, Any]:
        """What there is of the signals that a method asks for, in its own order, where the rows are."""
        device = self._rows.device
        return {s: on(self.seen[s], device) for s in self.program.reads[method] if s in self.seen}

    def edit(self, reduction: Reduction) -> None:
        """Follow an edit of the rows."""
        self.seen = {signal: follow(value, reduction) for signal, value in self.seen.items()}

    def forget(self, layer: int) -> None:
        """Let go of a layer's large signals once the next layer's edits are made."""
        site = Site("decoder", layer)
        for signal in (Hidden(site), Halves(site), KeyValue(site), QueryKey(site)):
            if not self.program.retain:
                self.seen.pop(signal, None)

    def forget_cache_rows(self, layer: int) -> None:
        """A whole model's attention rows would add up; this layer's were read, unless another method reads them too."""
        for signal in self.program.cache_signals.intersection(self.program.decoder_signals.get(layer, ())):
            self.seen.pop(signal, None)

    def enter(self, layer: int, x: Tensor) -> None:
        """What enters a layer."""
        if layer in self.program.hidden:
            self.seen[Hidden(Site("decoder", layer))] = x

    def observe_half(self, layer: int, number: int, x: Tensor, route: Route | None) -> None:
        """Input or output of a half of ``layer`` (numbered as `foveate.core.signal.Halves` lists them)."""
        site = Halves(Site("decoder", layer))
        x = x if route is None else route.spread.apply(x)
        self.seen[site] = (*self.seen.get(site, ()), x) if number else (x,)
        if number == 3:
            a, b, c, d = self.seen[site]
            self.seen[site] = ((a, b), (c, d))

    def observe(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        scale: float,
        mask: Tensor | None,
        cache: FoveateLayer,
        route: Route | None,
        turn: Turn,
    ) -> None:
        """What ``layer``'s attention shows."""
        written = self._rows.layout.shape[1] if route is None else route.restore.inputs
        elsewhere = None if cache.store is None else cache.store.log_mass(query, scale, turn)
        for signal in self.program.decoder_signals[layer]:
            every = self.whole and signal in self.program.cache_signals
            current = slice(0 if every else key.shape[2] - written, key.shape[2])
            self.seen[signal] = self._observed(signal, query, key, scale, mask, elsewhere, route, current)

    def made(self, layer: int, cache: FoveateLayer, route: Route | None) -> None:
        """Keys and values of the current rows, zero for rows that have none."""
        if layer not in self.program.key_value:
            return
        count = self._rows.layout.shape[1] if route is None or not route.skips else route.restore.inputs
        made = cache.keys[:, :, -count:], cache.values[:, :, -count:]
        self.seen[KeyValue(Site("decoder", layer))] = follow(made, route.restore) if route and route.skips else made

    def _observed(
        self,
        signal: Signal,
        query: Tensor,
        key: Tensor,
        scale: float,
        mask: Tensor | None,
        elsewhere: Tensor | None,
        route: Route | None,
        current: slice,
    ) -> Any:
        if isinstance(signal, QueryKey):
            made = query, key[:, :, current]
            return made if route is None else (follow(made[0], route.spread), follow(made[1], route.restore))
        shown: Any
        restore = None
        if route is not None:
            whole = current.start == 0 or (isinstance(signal, Rows) and signal.keys == "cache")
            past = key.shape[2] - route.restore.inputs if whole else 0
            restore = behind(route.restore, past) if past else route.restore
        if isinstance(signal, Rows):
            rows = attention.chosen_rows(query, key, scale, mask, self._queries(signal, query, route), elsewhere)
            if signal.keys == "cache":
                # Frozen rows' entries stand before the others' until the layer is done.
                return rows if route is None or route.skips else follow(rows, restore)
            shown = Attention(rows.logits[..., current], rows.lse)
        else:
            asking = self._asking(route)
            shown = attention.column_means(query, key, scale, mask, elsewhere=elsewhere, asking=asking)[:, current]
        return shown if restore is None else follow(shown, restore)

    def _queries(self, signal: Rows, query: Tensor, route: Route | None) -> Tensor:
        """``[B, Q]`` the rows that a signal asks for."""
        if isinstance(signal.queries, int):
            asking, count = self._asking(route), query.shape[2]
            if asking is not None:
                return last_of(asking, signal.queries)
            return torch.arange(max(count - signal.queries, 0), count, device=query.device).expand(query.shape[0], -1)
        question = self._rows.layout.question
        if route is not None:
            question = route.active.take(question) & route.active.valid
        return Reduction.keeping(question, self._question_counts).anchor

    def _asking(self, route: Route | None) -> Tensor | None:
        """``[B, q]`` which of a layer's queries are the prompt's, neither padding nor answers; None = all."""
        layout = self._rows.layout
        if route is not None:
            return route.active.take(layout.prompt) & route.active.valid
        return None if layout.dense and not any(layout.answers) else layout.prompt

    @cached_property
    def _question_counts(self) -> tuple[int, ...]:
        # Where no text follows, the last row asks.
        return tuple(self._rows.intake.question.sum(1).clamp(min=1).tolist())


class ByPicture:
    """An encoder signal at the sites of the language model (a `foveate.core.signal.ByItem`)."""

    def __init__(self, rows: Alive, signal: Signal, gather: Gather) -> None:
        self._rows, self._signal, self._gather = rows, signal, gather

    def of(self, items: Sequence[tuple[int, int]]) -> Any:
        """The signal of some items, given as (sample, number), that have n tokens alive each: ``[I, n, ...]``."""
        layout = self._rows.layout
        where = layout.where(items)
        sample = upload([b for b, _ in items], where.device)
        ordinal = layout.ordinal[sample[:, None], where]
        sources = [layout.items[b][number].source for b, number in items]
        return self._gather(self._signal, sources, ordinal)
