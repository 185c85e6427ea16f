"""One forward of the language model under a recipe: edits, masks, rotary tables, ledgers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from saccade.core.layout import Edit, Layout
from saccade.core.method import Cache, Plan, Routing, Tokens
from saccade.core.reduction import Reduction
from saccade.core.signal import Attention, Features, Rows, Signal, Site
from saccade.core.state import State
from saccade.engine import masks, probe
from saccade.engine.cache import Ledger, SaccadeLayer
from saccade.engine.clock import Clock
from saccade.engine.intake import Intake
from saccade.models.anatomy import Anatomy


class Program:
    """A checked recipe, sorted by the places where it acts.

    Attributes:
        tokens: methods that edit the sequence before each decoder layer (the sequence site is layer 0), in recipe order.
        routing: the method that routes each decoder layer.
        cache: the owner of the cache.
        reads: the signals of each method, in its own order.
        cache_signals: signals that the owner of the cache alone reads.
        decoder_signals, encoder_signals: what to record in each layer.
        features: whether to keep what the projector is fed.
    """

    def __init__(self, methods: tuple[Any, ...], anatomy: Anatomy) -> None:
        traits = anatomy.traits()
        self.methods = methods
        self.reads: dict[Any, tuple[Signal, ...]] = {method: method.reads(traits) for method in methods}
        self.tokens: dict[int, list[tuple[Site, Tokens]]] = {}
        self.routing: dict[int, Routing] = {}
        self.cache: Cache | None = None
        # The sequence site comes before decoder[0]; within a site, recipe order.
        for kind in ("sequence", "decoder"):
            for method in (m for m in methods if isinstance(m, Tokens)):
                for site in (s for s in method.sites(traits) if s.kind == kind):
                    self.tokens.setdefault(site.layer, []).append((site, method))
        for method in methods:
            if isinstance(method, Routing):
                self.routing.update(dict.fromkeys(method.routed(traits), method))
            if isinstance(method, Cache):
                self.cache = method

        read_by_others = {s for method, signals in self.reads.items() if method is not self.cache for s in signals}
        self.cache_signals = set(self.reads.get(self.cache, ())) - read_by_others
        self.decoder_signals: dict[int, list[Signal]] = {}
        self.encoder_signals: dict[int, list[Signal]] = {}
        self.features = False
        for signal in dict.fromkeys(signal for signals in self.reads.values() for signal in signals):
            if isinstance(signal, Features):
                self.features = True
            else:
                of_kind = self.encoder_signals if signal.site.kind == "encoder" else self.decoder_signals
                of_kind.setdefault(signal.site.layer, []).append(signal)


class Run:
    """One forward, from the call of the language model to its return."""

    def __init__(
        self,
        program: Program,
        anatomy: Anatomy,
        caches: list[SaccadeLayer],
        intake: Intake,
        positions: Tensor,
        encoder_signals: Mapping[Signal, Any],
        state: State,
        clock: Clock,
    ) -> None:
        self.program, self.anatomy, self.caches = program, anatomy, caches
        self.state, self.clock = state, clock
        self.past = caches[0].get_seq_length()
        self.rows = positions.shape[2]
        self.reads_images = any(map(len, intake.items))
        self.scoring_cache = program.cache is not None and self.past == 0 and self.rows > 1
        self.layouts: list[Layout] = []
        self.seen: dict[Signal, Any] = dict(encoder_signals) if self.reads_images else {}
        self.scores: list[Tensor | None] = []
        self.kept: list[Tensor | None] = []
        self.edited = False
        end = intake.tail
        self._end = None if end is None else end.to(positions.device)
        self._intake, self._positions = intake, positions
        self._shift: Tensor | None = None
        self._renumbered = False
        self._version = 0
        self._route: _Route | None = None
        self._memo: dict[tuple[Any, ...], Any] = {}

    @cached_property
    def layout(self) -> Layout:
        """What is alive now; made when first needed, so that a decode step of an uncompressed cache makes none."""
        return Layout.build(self._intake.visual, self._intake.valid, self._positions, self._intake.items)

    def enter(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder ``layer`` is to be called with instead."""
        if self.reads_images:
            for site, method in self.program.tokens.get(layer, ()):
                x = self._edit(site, method, x)
        if self.rows > 1:
            self.layouts.append(self.layout)
        cache = self.caches[layer]
        old = cache.ledger
        new = cache.ledger = self._once(self._extend, old)
        plan = self._plan(layer)
        if plan is None and not self.edited and old.complete and old.shift is None:
            return x, kwargs

        kwargs = dict(kwargs)
        # Gaps in position ids would be taken for packed sequences by FlashAttention; the rotary tables are made already.
        kwargs["position_ids"] = None
        rope = kwargs["position_embeddings"] = self._rope(layer, x, kwargs["position_embeddings"], old)
        base = kwargs.get("attention_mask")
        if plan is not None:
            x, kwargs = self._freeze(layer, x, plan, rope, base, old, kwargs)
        else:
            kwargs["attention_mask"] = self._mask(base, old, new, x)
        return x, kwargs

    def leave(self, layer: int, x: Tensor) -> Tensor:
        """What decoder ``layer`` is to return instead of ``x``."""
        if self._route is not None:
            x = self._thaw(layer, x)
        levels = self.state.get("prefill", "deepstack")
        if levels is not None and layer < levels.shape[2]:
            x = x + levels[:, :, layer].to(x.device, x.dtype)
        cache = self.caches[layer]
        if self.scoring_cache:
            self._score(layer, cache)
        cache.settle()
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The last hidden state in the caller's layout; dropped rows are zero."""
        if self.rows > 1:
            self.layouts.append(self.layout)
        if self.scoring_cache and self.program.cache is not None:
            with self.clock.lap("method"):
                self.kept = self.program.cache.plan(self.scores, self.layouts[:-1])
            for cache, entries, layout in zip(self.caches, self.kept, self.layouts):
                if entries is not None:
                    cache.keep(entries, holes=len(set(layout.live)) > 1)
        if not self.edited:
            return x
        out = x.new_zeros(x.shape[0], self.rows + 1, x.shape[2])
        # Padding rows are written to a spare last row.
        index = self.layout.origin.masked_fill(self.layout.origin < 0, self.rows)
        return out.scatter(1, index[..., None].expand_as(x), x)[:, : self.rows]

    def observe(self, layer: int, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        """Record what ``layer``'s attention shows."""
        if not (self.reads_images or self.scoring_cache):
            return
        with self.clock.lap("decoder signals"):
            for signal in self.program.decoder_signals[layer]:
                self.seen[signal] = self._observe(signal, query, key, scale, mask)

    def _observe(self, signal: Signal, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Any:
        if isinstance(signal, Rows):
            assert isinstance(signal.queries, int)
            rows = probe.last_rows(
                query, key, scale, mask, signal.queries, None if self.edited or self._route else self._end
            )
            current = Attention(rows.logits[..., key.shape[2] - self._written :], rows.lse)
            return current if self._route is None else current.after(self._route.restore)
        received = probe.received(query, key, scale, mask)[:, key.shape[2] - self._written :]
        return received if self._route is None else self._route.restore.apply(received)

    @property
    def _written(self) -> int:
        """Entries that the current layer adds to its cache."""
        return self.layout.shape[1] if self._route is None else self._route.restore.inputs

    def _edit(self, site: Site, method: Tokens, x: Tensor) -> Tensor:
        reads = self.program.reads[method]
        with self.clock.lap("method"):
            edit = method.edit(site, x, self.layout, {signal: self.seen[signal] for signal in reads}, self.state)
        if edit is None:
            return x
        after = self.layout.after(edit)
        if edit.positions == "contiguous":
            # Every sample ends in a valid row, so the last column says by how much later text moves down.
            down = edit.reduction.take(self.layout.positions[0])[:, -1] - after.positions[0][:, -1]
            self._shift = down if self._shift is None else self._shift + down
        self._renumbered |= not (isinstance(edit.positions, str) and edit.positions == "anchor")
        self.layout, self.edited = after, True
        self._version += 1
        self.state.compact(edit.reduction)
        self.seen = {signal: _follow(value, signal, edit) for signal, value in self.seen.items()}
        return edit.values if edit.values is not None else edit.reduction.apply(x)

    def _extend(self, old: Ledger) -> Ledger:
        if not self.edited:
            return old.extended(self.rows)
        shift = old.shift if self._shift is None else self._shift if old.shift is None else old.shift + self._shift
        return old.appended(self._tokens, self.past + self.rows, not self.layout.dense, shift)

    @property
    def _tokens(self) -> Tensor:
        """``[B, n]`` token number of each row, -1 = padding made by an edit."""
        return torch.where(self.layout.origin >= 0, self.layout.origin + self.past, -1)

    def _rope(self, layer: int, x: Tensor, given: tuple[Tensor, Tensor], old: Ledger) -> tuple[Tensor, Tensor]:
        if self._renumbered or old.shift is not None:
            kind = self.anatomy.config.layer_types[layer] if self.anatomy.typed_rotary else None
            return self._once(self._recompute, old.shift, key=kind, then=(layer, x))
        if not self.edited:
            return given
        return self._once(self._gather, given)

    def _recompute(self, shift: Tensor | None, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = self.layout.positions
        if shift is not None:
            positions = (positions - shift[:, None]).clamp(min=0)
        return self.anatomy.rotary(layer, x, positions)

    def _gather(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        index = self.layout.origin.clamp(min=0)[..., None]
        cos, sin = (
            table.expand(*table.shape[:-3], index.shape[0], *table.shape[-2:]).take_along_dim(index, dim=-2)
            for table in given
        )
        return cos, sin

    def _mask(self, base: Tensor | None, old: Ledger, new: Ledger, x: Tensor) -> Tensor | None:
        """None where plain causal attention is right, so that the fastest kernel stays in use."""
        in_order = base is None and not new.holes
        if in_order and (x.shape[1] == 1 or self.past == 0 or "flash" in self.anatomy.kernel):
            return None
        return self._once(self._pick, base, key=id(old), then=(new, x))

    def _pick(self, base: Tensor | None, new: Ledger, x: Tensor) -> Tensor:
        keys = new.tokens(x.shape[0], x.device)
        return self._by_head(masks.pick(base, self._tokens, keys, self.past, self.anatomy.kernel, x))

    def _by_head(self, mask: Tensor) -> Tensor:
        """A mask by key-value head, repeated for the query heads that share it."""
        heads = self.anatomy.config.num_attention_heads
        if mask.ndim == 2 or mask.shape[1] in (1, heads):
            return mask
        return mask.repeat_interleave(heads // mask.shape[1], dim=1)

    def _plan(self, layer: int) -> Plan | None:
        method = self.program.routing.get(layer)
        return method.plan(layer, self.layout) if method is not None and self.reads_images else None

    def _freeze(
        self,
        layer: int,
        x: Tensor,
        plan: Plan,
        rope: tuple[Tensor, Tensor],
        base: Tensor | None,
        old: Ledger,
        kwargs: dict[str, Any],
    ) -> tuple[Tensor, dict[str, Any]]:
        """Write the frozen rows' keys and values to the cache, and let the layer see the active rows only."""
        route = self._route = _Route(x, self.layout, plan)
        batch = x.shape[0]
        tables = [table.expand(batch, -1, -1) for table in rope]
        frozen = tuple(route.frozen.take(table) for table in tables)
        key, value = self.anatomy.keys_values(layer, route.frozen.take(x), frozen)  # type: ignore[arg-type]
        self.caches[layer].update(key, value)

        tokens = self._tokens
        numbers = [reduction.take(tokens).masked_fill(~reduction.valid, -1) for reduction in (route.frozen, route.active)]
        past = old.tokens(batch, x.device)
        keys = torch.cat([past, *(n[:, None].expand(-1, past.shape[1], -1) for n in numbers)], dim=-1)
        active = route.active.take(x)
        kwargs["position_embeddings"] = tuple(route.active.take(table) for table in tables)
        kwargs["attention_mask"] = self._by_head(masks.pick(base, numbers[1], keys, self.past, self.anatomy.kernel, x))
        return active, kwargs

    def _thaw(self, layer: int, x: Tensor) -> Tensor:
        """Put the active rows back among the frozen ones, and the cache into the order of the sequence."""
        route, self._route = self._route, None
        assert route is not None
        cache = self.caches[layer]
        index = route.restore.anchor
        past = cache.keys.shape[2] - route.restore.inputs

        def in_order(stored: Tensor) -> Tensor:
            rows = (index + past)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
            new = stored.gather(2, rows)
            return torch.cat([stored[:, :, :past], new], dim=2) if past else new

        cache.keys, cache.values = in_order(cache.keys), in_order(cache.values)
        return route.merge(x)

    def _score(self, layer: int, cache: SaccadeLayer) -> None:
        method = self.program.cache
        assert method is not None
        if cache.sliding_window is not None:  # holds the last tokens only, whatever they score
            self.scores.append(None)
            return
        reads = self.program.reads[method]
        with self.clock.lap("method"):
            seen = {signal: self.seen[signal] for signal in reads if signal in self.seen}
            self.scores.append(method.score(layer, cache.keys, cache.values, seen, self.layout))
        # A whole model's attention rows would add up; this layer's are read now, unless by another method too.
        for signal in self.program.cache_signals.intersection(self.program.decoder_signals.get(layer, ())):
            del self.seen[signal]

    def _once(self, make: Callable[..., Any], subject: Any, key: Any = None, then: tuple[Any, ...] = ()) -> Any:
        """Layers that share a ledger, a table or a mask share what is made of it."""
        entry = (make.__name__, id(subject), key, self._version)
        if entry not in self._memo:
            # Keeping the subject keeps its id from being given to another object.
            self._memo[entry] = (subject, make(subject, *then))
        return self._memo[entry][1]


class _Route:
    """Rows of one layer, parted into active and frozen ones.

    Attributes:
        restore: from cache order (frozen, then active) back to the order of the sequence.
    """

    def __init__(self, x: Tensor, layout: Layout, plan: Plan) -> None:
        self._x = x
        # Padding rows are neither: they pass through and write no entry that is ever read.
        counts = plan.active if layout.dense else None
        rest = None if counts is None else tuple(layout.shape[1] - n for n in counts)
        self.active = Reduction.keeping(~plan.frozen & layout.valid, counts)
        self.frozen = Reduction.keeping(plan.frozen & layout.valid, rest)
        order = torch.cat([self.frozen.anchor, self.active.anchor], dim=1)
        rows = layout.shape[1]
        # Row -> its column in `order`; padding columns write to a spare row, padding rows read column 0.
        where = order.new_zeros(order.shape[0], rows + 1)
        column = torch.arange(order.shape[1], device=x.device).expand_as(order)
        where.scatter_(1, order.masked_fill(order < 0, rows), column)
        self.restore = Reduction.gather(where[:, :rows], order.shape[1])

    def merge(self, x: Tensor) -> Tensor:
        """``x`` ``[B, active, D]`` among the frozen rows."""
        rows = self._x.shape[1]
        out = torch.cat([self._x, self._x[:, :1]], dim=1)
        index = self.active.anchor.masked_fill(~self.active.valid, rows)
        return out.scatter_(1, index[..., None].expand_as(x), x)[:, :rows]


def _is_encoder(signal: Signal) -> bool:
    return isinstance(signal, Features) or signal.site.kind == "encoder"


def _follow(value: Any, signal: Signal, edit: Edit) -> Any:
    """A recorded signal after an edit of the sequence; encoder signals are by image and stay."""
    if _is_encoder(signal):
        return value
    return value.after(edit.reduction) if isinstance(value, Attention) else edit.reduction.apply(value)
