"""One forward of the language model under a recipe: edits, masks, rotary tables, ledgers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout, last_of
from foveate.core.method import Cache, Companion, Entries, Kept, Method, Plan, Tokens
from foveate.core.ranking import looking
from foveate.core.reduction import Reduction
from foveate.core.signal import (
    Attention,
    Halves,
    Hidden,
    KeyValue,
    QueryKey,
    Question,
    Rows,
    Signal,
    Site,
    follow,
    on,
)
from foveate.core.state import State
from foveate.core.step import Step
from foveate.engine import masks, probe
from foveate.engine.cache import FoveateLayer, Ledger
from foveate.engine.clock import Clock
from foveate.engine.intake import Intake
from foveate.engine.program import Program
from foveate.engine.vision import Look
from foveate.models.anatomy import Anatomy
from foveate.ops import ragged


class _ByItem:
    """An encoder signal at the sites of the language model (a `foveate.core.signal.ByItem`)."""

    def __init__(self, run: Run, signal: Signal) -> None:
        self._run, self._signal = run, signal

    def of(self, items: Sequence[tuple[int, int]]) -> Any:
        layout = self._run.layout
        where = layout.where(items)
        sample = torch.tensor([b for b, _ in items], device=where.device)
        ordinal = layout.ordinal[sample[:, None], where]
        sources = [layout.items[b][number].source for b, number in items]
        return self._run.gather(self._signal, sources, ordinal)


class Run:
    """One forward, from the call of the language model to its return.

    ``turn`` says whether these rows are (part of) a prompt, and not tokens that are generated or tried out.
    """

    def __init__(
        self,
        program: Program,
        anatomy: Anatomy,
        caches: list[FoveateLayer],
        intake: Intake,
        positions: Tensor,
        looks: Sequence[Look],
        state: State,
        clock: Clock,
        *,
        turn: bool,
        companion: Companion | None = None,
    ) -> None:
        self.program, self.anatomy, self.caches = program, anatomy, caches
        self.state, self.clock = state, clock
        self.turn = turn
        self.past = next(cache for cache in caches if isinstance(cache, FoveateLayer)).get_seq_length()
        self.rows = positions.shape[2]
        self.reads_images = any(map(len, intake.items))
        self.scoring_cache = program.cache is not None and self.past == 0 and self.rows > 1
        self.layouts: list[Layout] = []
        self.cached: list[Layout] = []
        self.ran: list[tuple[tuple[int, ...], Any]] = []
        self.routes: list[Plan | None] = []
        self.slots: dict[int, Tensor] = {}
        self.seen: dict[Signal, Any] = dict(program.given)
        self.scores: list[Tensor | None] = []
        self.steps: list[Step] = []
        self._unscored: dict[int, dict[Signal, Any]] = {}
        self.edited = False
        self._intake, self._positions = intake, positions
        self._looks = sorted(looks, key=lambda look: look.kind)  # as the intake counts them: images first
        self._device = positions.device
        self._shift: Tensor | None = None
        self._route: _Route | None = None
        self._inside = False
        self._memo: dict[tuple[Any, ...], Any] = {}
        if self.reads_images:
            self.seen |= {signal: _ByItem(self, signal) for signal in program.signals_by_item}
            if program.asks_companion and companion is not None and intake.ids is not None:
                self.seen[Question()] = companion.question([ids[q] for ids, q in zip(intake.ids, intake.question)])
        for cache in caches if turn else ():
            if isinstance(cache, FoveateLayer):
                cache.look_up()

    @cached_property
    def layout(self) -> Layout:
        """What is alive now; made when first needed, so that a decode step of an uncompressed cache makes none."""
        return self._intake.layout(self._positions)

    def gather(self, signal: Signal, sources: Sequence[int], ordinal: Tensor) -> Any:
        """An encoder signal of the tokens ``ordinal`` ``[I, n]`` of grids of one shape, by their numbers in the prompt."""
        start = 0
        for look in self._looks:
            if sources[0] < start + len(look.views):
                return look.gather(signal, [source - start for source in sources], ordinal)
            start += len(look.views)
        raise LookupError(f"grid {sources[0]} was encoded elsewhere")

    def _watching(self, layout: Layout, by_head: bool = False) -> AbstractContextManager[list[Tensor] | None]:
        """What the rows are ranked by meanwhile, if somebody wants to know."""
        return looking(layout.shape, by_head) if self.program.watched else nullcontext()

    def timed(self, name: str) -> AbstractContextManager[None]:
        """A lap of the clock; steps of decoding are too short to be timed in parts."""
        return nullcontext() if self.rows == 1 else self.clock.lap(name)

    def enter(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder ``layer`` is to be called with instead."""
        x, kwargs = self._prepare(layer, x, kwargs)
        self._inside = True
        return x, kwargs

    def _prepare(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        self._go(x.device)
        if self.reads_images:
            if layer == 0:
                x = self._arrive(x)
            for site, method in self.program.tokens.get(layer, ()):
                x = self._edit(layer, site, method, x)
            if layer == self.program.cut:
                while self._unscored:
                    self._score(*self._unscored.popitem())
        if self.program.devices[layer] is not None:
            x = x.to(self.program.devices[layer])  # accelerate would do so later
            self._go(x.device)
        if self.rows > 1:
            self._forget(layer - 1)
            self.layouts.append(self.layout)
            if layer in self.program.hidden:
                self.seen[Hidden(Site("decoder", layer))] = x
        cache = self.caches[layer]
        if not isinstance(cache, FoveateLayer):
            return x, self._recur(layer, kwargs)
        if self.rows == 1 and self.program.cache is not None and cache.prompt is not None:
            self._step(layer, cache)
        plan = self._plan(layer, x)
        self.routes.append(plan)
        old = cache.ledger
        if plan is not None:
            return self._part(layer, x, plan, old, kwargs)
        self.ran.append((self.layout.live, self.layout.live) if self.rows > 1 else ((), ()))
        new = cache.ledger = self._once(self._extend, old)
        if not self.edited and old.complete and old.shift is None:
            return x, kwargs
        kwargs = self._unpositioned(kwargs)
        kwargs["position_embeddings"] = self._rope(layer, x, kwargs["position_embeddings"], old)
        kwargs["attention_mask"] = self._mask(kwargs.get("attention_mask"), old, new, x)
        return x, kwargs

    def weigh(self, layer: int, index: Tensor, weights: Tensor) -> Tensor:
        """Weights of the experts ``index`` ``[rows, K]`` that ``layer`` is to run with, instead of the router's."""
        if not self._inside:
            return weights  # a method calls the layer's parts itself
        batch, route = self._positions.shape[1], self._route
        new, chosen = (part.unflatten(0, (batch, -1)) for part in (weights, index))
        if route is not None:
            new, chosen = (route.spread.apply(part) for part in (new, chosen))
        for method in self.program.experts[layer]:
            with self.timed("method"):
                weighed = method.weigh(layer, new, chosen, self.layout, self._read(method), self.state)
            new = new if weighed is None else weighed.to(new.dtype)
        if self.rows > 1:
            self.slots[layer] = ((new != 0) & self.layout.valid[..., None]).sum((1, 2))
        return (new if route is None else route.active.apply(new)).flatten(0, 1)

    def leave(self, layer: int, x: Tensor) -> Tensor:
        """What decoder ``layer`` is to return instead of ``x``."""
        self._inside = False
        route, cache = self._route, self.caches[layer]
        if route is not None:
            x = self._join(cache, x)
        levels = self.state.get("prefill", "deepstack")
        if levels is not None and layer < levels.shape[2]:
            x = x + levels[:, :, layer].to(x.device, x.dtype)
        if not isinstance(cache, FoveateLayer):
            self.cached.append(self.layout)
            self.scores.append(None)
            return x
        if self.rows > 1:
            if layer in self.program.key_value and self.reads_images:
                self.seen[KeyValue(Site("decoder", layer))] = self._made(cache, route)
            self._own_cache(layer, cache, route)
        cache.settle()
        self._route = None
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The last hidden state in the caller's layout; dropped rows are zero."""
        self._go(x.device)
        if self.rows > 1:
            self.layouts.append(self.layout)
        if self.scoring_cache and self.program.cache is not None:
            with self.clock.lap("method"):
                layouts = [layout.without_answers.to(x.device) for layout in self.cached]
                plans = self.program.cache.plan(on(self.scores, x.device), layouts)
            for layer, kept in enumerate(plans):
                self._compress(layer, _with_answers(kept, self.cached[layer].to(x.device)))
        if not self.edited:
            return x
        out = x.new_zeros(x.shape[0], self.rows + 1, x.shape[2])
        return out.scatter_(1, self._places[..., None].expand_as(x), x)[:, : self.rows]

    def close(self) -> None:
        """Let go of what was recorded: some of it refers back to the run, which would wait for the garbage collector."""
        self.seen = {}

    @property
    def alive(self) -> Tensor:
        """``[B, rows]`` bool: which rows of the caller's layout have lived through all layers."""
        alive = torch.zeros(len(self._places), self.rows + 1, dtype=torch.bool, device=self._places.device)
        return alive.scatter(1, self._places, True)[:, : self.rows]

    @property
    def _places(self) -> Tensor:
        """``[B, n]`` places of the rows in the caller's layout; padding rows have a spare one behind its last."""
        return self.layout.origin.masked_fill(self.layout.origin < 0, self.rows)

    def observe(self, layer: int, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        """Record what ``layer``'s attention shows."""
        if not (self.reads_images or self.scoring_cache or self.turn):
            return
        with self.clock.lap("decoder signals"):
            for signal in self.program.decoder_signals[layer]:
                self.seen[signal] = self._observe(layer, signal, query, key, scale, mask)

    def observe_half(self, layer: int, number: int, x: Tensor) -> None:
        """Record input or output of a half of ``layer`` (numbered as `foveate.core.signal.Halves` lists them)."""
        if not self.reads_images or layer != len(self.layouts) - 1 or not self._inside:
            return  # a method calls the layer's parts itself
        site = Halves(Site("decoder", layer))
        x = x if self._route is None else self._route.spread.apply(x)
        self.seen[site] = (*self.seen.get(site, ()), x) if number else (x,)
        if number == 3:
            a, b, c, d = self.seen[site]
            self.seen[site] = ((a, b), (c, d))

    def _observe(self, layer: int, signal: Signal, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> Any:
        current = slice(key.shape[2] - self._written, None)
        route, blocks = self._route, self.caches[layer].blocks
        elsewhere = None if blocks is None else ragged.log_mass(query, blocks, scale)
        if isinstance(signal, QueryKey):
            made = query, key[:, :, current]
            return made if route is None else (follow(made[0], route.spread), follow(made[1], route.restore))
        if isinstance(signal, Rows):
            rows = probe.chosen_rows(query, key, scale, mask, self._queries(signal, query), elsewhere)
            if signal.keys == "cache":
                if route is None or not route.plan.frozen:
                    return rows
                # Frozen rows' entries stand before the others' until the layer is done.
                return rows.after(_behind(route.restore, rows.logits.shape[3] - self._written))
            shown: Any = Attention(rows.logits[..., current], rows.lse)
        else:
            shown = probe.received(query, key, scale, mask, elsewhere=elsewhere, asking=self._asking)[:, current]
        return shown if route is None else follow(shown, route.restore)

    def _queries(self, signal: Rows, query: Tensor) -> Tensor:
        """``[B, Q]`` the rows that a signal asks for."""
        if isinstance(signal.queries, int):
            asking, rows = self._asking, query.shape[2]
            if asking is not None:
                return last_of(asking, signal.queries)
            return torch.arange(max(rows - signal.queries, 0), rows, device=query.device).expand(query.shape[0], -1)
        question = self.layout.question
        if self._route is not None:
            question = self._route.active.take(question) & self._route.active.valid
        return Reduction.keeping(question, self._question_counts).anchor

    @property
    def _asking(self) -> Tensor | None:
        """``[B, q]`` which of a layer's queries are the prompt's, neither padding nor answers; None = all."""
        layout, route = self.layout, self._route
        if route is not None:
            return route.active.take(layout.prompt) & route.active.valid
        return None if layout.dense and not any(layout.answers) else layout.prompt

    @cached_property
    def _question_counts(self) -> tuple[int, ...]:
        # Where no text follows, the last row asks.
        return tuple(self._intake.question.sum(1).clamp(min=1).tolist())

    @property
    def _written(self) -> int:
        """Entries that the current layer adds to its cache."""
        return self.layout.shape[1] if self._route is None else self._route.restore.inputs

    def _read(self, method: Method) -> dict[Signal, Any]:
        """What there is of the signals that a method asks for, in its own order; these, and its state, come to the rows."""
        self.state.to(self._device)
        return {s: on(self.seen[s], self._device) for s in self.program.reads[method] if s in self.seen}

    def _go(self, device: torch.device) -> None:
        """Follow the rows to another device."""
        if device == self._device:
            return
        if "layout" in self.__dict__:
            self.layout = self.layout.to(device)
        self._positions = self._positions.to(device)
        self._shift = None if self._shift is None else self._shift.to(device)
        self._device = device
        self._memo.clear()

    def _forget(self, layer: int) -> None:
        """Let go of a layer's large signals once the next layer's edits are made."""
        site = Site("decoder", layer)
        for signal in (Hidden(site), Halves(site), KeyValue(site), QueryKey(site)):
            if signal in self.seen and not self.program.retain:
                del self.seen[signal]

    # Edits.

    def _arrive(self, x: Tensor) -> Tensor:
        """Drop the slots that were emptied before the language model, and put the rows into their new order."""
        edited = [look for look in self._looks if look.edited]
        if not edited:
            return x
        layout = self.layout
        ranks, counts = _survivors(self._looks)
        table = pad_sequence([rank.to(x.device) for rank in ranks], batch_first=True, padding_value=-1)
        sources = [torch.tensor([grid.source for grid in grids] or [0]) for grids in layout.items]
        owner = pad_sequence(sources, batch_first=True).to(x.device)
        source = owner.gather(1, layout.item.clamp(min=0))
        visual = layout.ordinal >= 0
        rank = torch.where(visual, table[source, layout.ordinal.clamp(min=0)], -1)
        keep = layout.valid & (~visual | (rank >= 0))
        shown = tuple(sum(counts[grid.source] for grid in grids) for grids in layout.items)
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, shown))
        kept = Reduction.keeping(keep, live)
        item = kept.take(layout.item).masked_fill(~kept.valid, -1)
        anchor = kept.anchor.gather(1, _ranked(item, kept.take(rank)))
        look = edited[-1]
        edit = Edit(
            Reduction.gather(anchor, kept.inputs),
            positions=look.positions,
            text_after=look.text_after,
            live=live,
            visual=shown,
        )
        return self._apply(0, edit, x)

    def _edit(self, layer: int, site: Site, method: Tokens, x: Tensor) -> Tensor:
        before = self.layout
        with self.clock.lap("method"), self._watching(before) as scores:
            edit = method.edit(site, x, before, self._read(method), self.state)
        if edit is None:
            return x
        if layer > 0 and any(before.pinned):
            self._refuse_losing_the_end(layer, method, edit)
        x = self._apply(layer, edit, x)
        if scores is not None:
            self.steps.append(Step(method, site, "edit", before, self.layout, edit.reduction, tuple(scores)))
        return x

    def _refuse_losing_the_end(self, layer: int, method: Method, edit: Edit) -> None:
        """Before the first layer another row may take the place of the one that predicts; later that one has begun to."""
        stays = (edit.reduction.anchor == self.layout.last).any(1).tolist()
        if any(ends and not stay for ends, stay in zip(self.layout.pinned, stays)):
            raise FoveateError(
                f"input_ids: the prompt ends in its picture, whose last row predicts the next token, and {method.name} does "
                f"away with it before layer {layer}; put text behind the picture"
            )

    def _apply(self, layer: int, edit: Edit, x: Tensor) -> Tensor:
        after = self.layout.after(edit)
        if not (isinstance(edit.positions, str) and edit.positions == "anchor" and edit.text_after == "keep"):
            down = _end(self.layout) - _end(after)
            self._shift = down if self._shift is None else self._shift + down
        self.layout, self.edited = after, True
        self._memo.clear()
        self.state.compact(edit.reduction)
        self.seen = {signal: follow(value, edit.reduction) for signal, value in self.seen.items()}
        if edit.all_layers:
            for earlier in range(layer):
                self._cut(earlier)
        return edit.values if edit.values is not None else edit.reduction.apply(x)

    def _cut(self, layer: int) -> None:
        """Cut the rows that are gone from a finished layer's cache."""
        cache, route = self.caches[layer], self.routes[layer]
        if not isinstance(cache, FoveateLayer) or cache.sliding_window is not None:
            return
        before = self.cached[layer]
        edit = self._once(self._rows_left, before, then=(route is None or route.frozen,))
        past = cache.keys.shape[2] - before.shape[1]
        entries = self._once(_behind, edit.reduction, key=past, then=(past,))
        after = self.cached[layer] = self._once(before.after, edit)
        holes = not after.dense or cache.ledger.holes
        ledger = self._once(lambda old: old.kept(entries.anchor[:, None], holes), cache.ledger, key="cut")
        cache.keep(entries.anchor[:, None], holes)
        cache.ledger = ledger
        for signal, value in self._unscored.get(layer, {}).items():
            whole = isinstance(signal, Rows) and signal.keys == "cache"
            self._unscored[layer][signal] = value.after(entries) if whole else follow(value, edit.reduction)

    def _rows_left(self, before: Layout, everything: bool) -> Edit:
        """The edit that leaves, of the rows ``before``, those that are alive now; ``everything`` alive is among them."""
        now = self.layout.origin.to(before.origin.device).contiguous()
        index = torch.searchsorted(now, before.origin.contiguous()).clamp(max=now.shape[1] - 1)
        alive = (now.gather(1, index) == before.origin) & (before.origin >= 0)
        live, visual = (self.layout.live, self.layout.visual) if everything else (None, None)
        return Edit(Reduction.keeping(alive, live), live=live, visual=visual)

    # Positions, masks and ledgers.

    def _extend(self, old: Ledger) -> Ledger:
        if self.reads_images:
            old = replace(old, visual=self._visual(old))
        if not self.edited:
            return old.extended(self.rows)
        return old.appended(self._tokens, self.past + self.rows, not self.layout.dense, self._moved(old))

    def _moved(self, old: Ledger) -> Tensor | None:
        if self._shift is None or old.shift is None:
            return old.shift if self._shift is None else self._shift
        return old.shift.to(self._device) + self._shift

    def _visual(self, old: Ledger) -> Tensor:
        """Which tokens of the conversation are visual."""
        now = self._intake.visual.to(self._positions.device)
        before = now.new_zeros(now.shape[0], self.past)
        if old.visual is not None:
            before[:, : old.visual.shape[1]] = old.visual
        return torch.cat([before, now], dim=1)

    @property
    def _tokens(self) -> Tensor:
        """``[B, n]`` token number of each row, -1 = padding made by an edit."""
        if not self.edited:
            batch, device = self._positions.shape[1], self._positions.device
            return torch.arange(self.past, self.past + self.rows, device=device).expand(batch, -1)
        return torch.where(self.layout.origin >= 0, self.layout.origin + self.past, -1)

    @staticmethod
    def _unpositioned(kwargs: dict[str, Any]) -> dict[str, Any]:
        # Gaps in position ids would be taken for packed sequences by FlashAttention; the rotary tables are made already.
        return dict(kwargs, position_ids=None)

    def _rope(self, layer: int, x: Tensor, given: tuple[Tensor, Tensor], old: Ledger) -> tuple[Tensor, Tensor]:
        if not self.edited and old.shift is None:
            return given
        kind = self.anatomy.config.layer_types[layer] if self.anatomy.typed_rotary else None
        return self._once(self._tables, old.shift, key=kind, then=(layer, x))

    def _tables(self, shift: Tensor | None, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        positions = (self.layout.positions if self.edited else self._positions).to(x.device)
        if shift is not None:
            positions = (positions - shift.to(x.device)[:, None]).clamp(min=0)
        return self.anatomy.rotary(layer, x, positions)

    def _mask(
        self, base: Tensor | None, old: Ledger, new: Ledger, x: Tensor, queries: Tensor | None = None
    ) -> Tensor | None:
        """None where plain causal attention is right, so that the fastest kernel stays in use."""
        in_order = base is None and not new.holes
        if in_order and (x.shape[1] == 1 or self.past == 0 or "flash" in self.anatomy.kernel):
            return None
        if queries is not None:
            return self._pick(base, new, x, queries)
        return self._once(self._pick, base, key=id(old), then=(new, x, self._tokens))

    def _pick(self, base: Tensor | None, new: Ledger, x: Tensor, queries: Tensor) -> Tensor:
        keys = _dense(new.tokens(x.shape[0], x.device), new)
        base = None if base is None else base.to(x.device)
        return self._by_head(masks.pick(base, queries, keys, self.past, self.anatomy.kernel, x))

    def _by_head(self, mask: Tensor) -> Tensor:
        """A mask by key-value head, repeated for the query heads that share it."""
        heads = self.anatomy.config.num_attention_heads
        if mask.ndim == 2 or mask.shape[1] in (1, heads):
            return mask
        return mask.repeat_interleave(heads // mask.shape[1], dim=1)

    def _recur(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For a layer with a recurrent state: rows that are gone were never there, padding is masked row by row."""
        self.routes.append(None)
        self.ran.append((self.layout.live, self.layout.live) if self.rows > 1 else ((), ()))
        if not self.edited:
            return kwargs
        given = kwargs.get("attention_mask")
        if not self.layout.dense and self.past:
            raise FoveateError(
                f"{self.anatomy.family}: a later turn's samples keep different numbers of rows, and padding would disturb "
                "the recurrent state; run them one at a time"
            )
        mask = None if given is None and self.layout.dense else self.layout.valid
        return dict(kwargs, position_ids=None, attention_mask=mask)

    # Routing.

    def _plan(self, layer: int, x: Tensor) -> Plan | None:
        method = self.program.routing.get(layer)
        if method is None or not self.reads_images:
            return None
        with self.clock.lap("method"), self._watching(self.layout) as scores:
            plan = method.plan(layer, x, self.layout, self._read(method), self.state)
        if scores is not None:
            site = Site("decoder", layer)
            self.steps.append(Step(method, site, "route", self.layout, self.layout, scores=tuple(scores)))
        if plan is not None and any(self.layout.pinned):
            # What predicts the next token runs through every layer, on top of what the method chose.
            plan = replace(plan, active=plan.active | self.layout.predicting, counts=None)
        return plan

    def _part(self, layer: int, x: Tensor, plan: Plan, old: Ledger, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Let the layer see the active rows only; frozen ones have their keys and values in the cache before it runs."""
        kwargs = self._unpositioned(kwargs)
        rope = self._rope(layer, x, kwargs["position_embeddings"], old)
        route = self._route = _Route(x, self.layout, plan)
        self.ran.append((self.layout.live if plan.frozen else route.counts, route.counts))
        cache, tokens = self.caches[layer], self._tokens
        tables = [table.to(x.device).expand(x.shape[0], -1, -1) for table in rope]
        mine = route.active.take(tokens).masked_fill(~route.active.valid, -1)
        kwargs["position_embeddings"] = tuple(route.active.take(table) for table in tables)
        base = kwargs.get("attention_mask")
        active = route.active.take(x)
        if not plan.frozen:
            holes = route.counts is None or len(set(route.counts)) > 1
            marked = replace(old, visual=self._visual(old))
            new = cache.ledger = marked.appended(mine, self.past + self.rows, holes, self._moved(old))
            kwargs["attention_mask"] = self._mask(base, old, new, active, mine)
            return active, kwargs

        cache.ledger = self._once(self._extend, old)
        others = tuple(route.frozen.take(table) for table in tables)
        cache.update(*self.anatomy.keys_values(layer, route.frozen.take(x), others))  # type: ignore[arg-type]
        rest = route.frozen.take(tokens).masked_fill(~route.frozen.valid, -1)
        past = _dense(old.tokens(x.shape[0], x.device), old)
        keys = torch.cat([past, *(n[:, None].expand(-1, past.shape[1], -1) for n in (rest, mine))], dim=-1)
        mask = masks.pick(None if base is None else base.to(x.device), mine, keys, self.past, self.anatomy.kernel, x)
        kwargs["attention_mask"] = self._by_head(mask)
        return active, kwargs

    def _join(self, cache: FoveateLayer, x: Tensor) -> Tensor:
        """Put the active rows back among the others, and frozen rows' entries into the order of the sequence."""
        route = self._route
        assert route is not None
        if route.plan.frozen:
            index = route.restore.anchor
            past = cache.keys.shape[2] - route.restore.inputs

            def in_order(stored: Tensor) -> Tensor:
                rows = (index + past)[:, None, :, None].expand(-1, stored.shape[1], -1, stored.shape[3])
                new = stored.gather(2, rows)
                return torch.cat([stored[:, :, :past], new], dim=2) if past else new

            cache.keys, cache.values = in_order(cache.keys), in_order(cache.values)
        return route.merge(x)

    # The cache.

    def _made(self, cache: FoveateLayer, route: _Route | None) -> tuple[Tensor, Tensor]:
        """Keys and values of the current rows, zero for rows that have none."""
        if route is None or route.plan.frozen:
            count = self.layout.shape[1]
            return cache.keys[:, :, -count:], cache.values[:, :, -count:]
        count = route.restore.inputs
        keys, values = follow((cache.keys[:, :, -count:], cache.values[:, :, -count:]), route.restore)
        return keys, values

    def _own_cache(self, layer: int, cache: FoveateLayer, route: _Route | None) -> None:
        """Score a layer for the owner of the cache, or let it choose what decoding reads."""
        method = self.program.cache
        skipping = route is not None and not route.plan.frozen
        layout = self.layout.after(Edit(route.active, live=route.counts)) if skipping and route else self.layout
        self.cached.append(layout)
        self.scores.append(None)
        if method is None or cache.sliding_window is not None:  # which holds the last tokens only, whatever they score
            return
        seen = self._read(method)
        if skipping and route:
            seen = {signal: follow(value, route.active) for signal, value in seen.items()}
        if self.reads_images and layer < self.program.cut:
            self._unscored[layer] = seen
        else:
            self._score(layer, seen)
        # A whole model's attention rows would add up; this layer's are read now, unless by another method too.
        for signal in self.program.cache_signals.intersection(self.program.decoder_signals.get(layer, ())):
            self.seen.pop(signal, None)

    def _score(self, layer: int, seen: Mapping[Signal, Any]) -> None:
        method, cache, layout = self.program.cache, self.caches[layer], self.cached[layer].without_answers
        assert method is not None
        with self.clock.lap("method"), self._watching(layout, by_head=True) as scores:
            if self.scoring_cache:
                self.scores[layer] = method.score(layer, cache.keys, cache.values, seen, layout)
            if self.turn and type(method).view is not Cache.view:
                self._look(method, layer, cache, seen, layout)
        if scores is not None:
            self.steps.append(Step(method, Site("decoder", layer), "cache", layout, layout, scores=tuple(scores)))

    def _look(self, method: Cache, layer: int, cache: FoveateLayer, seen: Mapping[Signal, Any], layout: Layout) -> None:
        tokens = _dense(cache.ledger.tokens(layout.shape[0], cache.keys.device), cache.ledger)
        visual = cache.ledger.is_visual(tokens)
        # How many there are is the same for layers that hold the same tokens: asked of the device once for them all.
        counts = self._once(lambda ledger: tuple(visual[:, 0].sum(1).tolist()), cache.ledger, key="visual")
        chosen = method.view(layer, Entries(tokens, visual, counts), seen, layout)
        if chosen is not None:
            cache.look(chosen, holes=cache.ledger.holes or len(set(counts)) > 1)

    def _compress(self, layer: int, kept: Kept | None) -> None:
        cache, layout = self.caches[layer], self.cached[layer]
        if not isinstance(cache, FoveateLayer):
            return
        method = self.program.cache
        live = layout.live
        if kept is not None and kept.ragged:
            cache.keep_ragged(kept.entries.to(cache.keys.device))
        elif kept is not None:
            counts = kept.counts or live
            cache.keep(kept.entries.to(cache.keys.device), holes=len(set(zip(counts, layout.answers or counts))) > 1)
            live = counts
        if type(method).step is not Cache.step and cache.sliding_window is None and cache.blocks is None:
            if kept is not None and kept.counts is None:
                live = tuple((kept.entries[:, 0] >= 0).sum(1).tolist())
            cache.prompt, cache.spare = live, tuple(cache.keys.shape[2] - count for count in live)
            cache.length, cache.prompt_tokens = tuple(self._intake.valid.sum(1).tolist()), self.rows

    def _step(self, layer: int, cache: FoveateLayer) -> None:
        method = self.program.cache
        assert method is not None
        assert cache.prompt is not None
        later = self.past + 1 - cache.prompt_tokens
        slots = [
            method.step(layer, prompt, cache.keys.shape[2] - spare, length + later, length)
            for prompt, spare, length in zip(cache.prompt, cache.spare, cache.length)
        ]
        if any(slot is not None for slot in slots):
            cache.evict(slots)

    def _once(self, make: Callable[..., Any], subject: Any, key: Any = None, then: tuple[Any, ...] = ()) -> Any:
        """Layers that share a ledger, a table or a mask share what is made of it."""
        entry = (getattr(make, "__qualname__", ""), id(subject), key)
        if entry not in self._memo:
            # Keeping the subject keeps its id from being given to another object.
            self._memo[entry] = (subject, make(subject, *then))
        return self._memo[entry][1]


class _Route:
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

    def merge(self, x: Tensor) -> Tensor:
        """``x`` ``[B, active, D]`` among the other rows."""
        rows = self.x.shape[1]
        out = torch.cat([self.x, self.x[:, :1]], dim=1)
        index = self.active.anchor.masked_fill(~self.active.valid, rows)
        return out.scatter_(1, index[..., None].expand_as(x), x)[:, :rows]


def _with_answers(kept: Kept | None, layout: Layout) -> Kept | None:
    """What is kept of a prompt of ``layout``, and the entries of the answer behind it, all of them."""
    if kept is None or not any(layout.answers):
        return kept
    answer = last_of(layout.valid & ~layout.prompt, max(layout.answers))[:, None].expand(-1, kept.entries.shape[1], -1)
    # What is missing on the left of the answer goes to the left of all.
    entries = torch.cat([kept.entries.to(answer.device), answer], dim=2).sort(dim=2).values
    counts = kept.counts and tuple(map(sum, zip(kept.counts, layout.answers)))
    return replace(kept, entries=entries, counts=counts)


def _end(layout: Layout) -> Tensor:
    """``[B]`` the largest rotary position of each sample, behind which later text goes on."""
    positions = layout.positions[1:] if len(layout.positions) == 4 else layout.positions  # a row in front numbers the tokens
    return positions.masked_fill(~layout.valid, 0).amax((0, 2))


def _inverse(order: Tensor, rows: int, missing: int) -> Reduction:
    """Puts back what was gathered by ``order`` ``[B, n]`` (-1 = padding); other rows read column ``missing`` (-1 = zero)."""
    # Padding columns write to a spare row.
    where = order.new_full((order.shape[0], rows + 1), missing)
    column = torch.arange(order.shape[1], device=order.device).expand_as(order)
    where.scatter_(1, order.masked_fill(order < 0, rows), column)
    return Reduction.gather(where[:, :rows], order.shape[1])


def _dense(tokens: Tensor, ledger: Ledger) -> Tensor:
    """Those of ``tokens`` ``[B, h, n]`` in dense tensors; what lies in blocks is read elsewhere, by every query."""
    return tokens[:, :1, ledger.blocked :] if ledger.blocked else tokens


def _behind(reduction: Reduction, past: int) -> Reduction:
    """A reduction of the current rows as one of a layer's entries, which are ``past`` earlier ones and these."""
    earlier = torch.arange(past, device=reduction.anchor.device).expand(reduction.shape[0], -1)
    anchor = torch.where(reduction.valid, reduction.anchor + past, -1)
    return Reduction.gather(torch.cat([earlier, anchor], dim=1), past + reduction.inputs)


def _survivors(looks: Sequence[Look]) -> tuple[list[Tensor], list[int]]:
    """Rank of each token and number of survivors of every grid, in the order in which the intake numbers them."""
    ranks, counts = [], []
    for look in looks:
        for left, view in zip(look.survivors, look.views):
            ranks.append(torch.arange(view.rows * view.columns) if left.rank is None else left.rank)
            counts.append(left.count)
    return ranks, counts


def _ranked(item: Tensor, rank: Tensor) -> Tensor:
    """``[B, n]`` which row goes where, so that each item's rows stand in the order of their ``rank``; text rows stay."""
    place = torch.arange(item.shape[1], device=item.device)
    span = item.shape[1] + 1
    fixed = span * span + place  # behind every item: there are fewer items than rows
    places = torch.where(item >= 0, item * span, fixed).argsort(dim=1, stable=True)
    rows = torch.where(item >= 0, item * span + rank, fixed).argsort(dim=1, stable=True)
    return torch.empty_like(rows).scatter(1, places, rows)
