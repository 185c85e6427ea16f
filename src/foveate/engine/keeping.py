"""The cache of one forward: what its owner scores, keeps and lets decoding read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.method import Cache, Entries, Kept, Packed, Plan
from foveate.core.reduction import Reduction
from foveate.core.roles import VISUAL, last_of
from foveate.core.signal import Columns, Signal, Site, follow, on
from foveate.core.signal import Rows as AttentionRows
from foveate.core.step import Step
from foveate.engine.cache import FoveateLayer
from foveate.engine.clock import Clock
from foveate.engine.eviction import Eviction
from foveate.engine.ledger import Ledger
from foveate.engine.program import Program
from foveate.engine.route import Route, behind
from foveate.engine.rows import Rows
from foveate.ops.ragged import Blocks


class Keeping:
    """The cache of one forward.

    Attributes:
        layers: its layers.
        cached: for each layer so far, the rows that it wrote.
        scoring: whether its owner says what stays of this prompt.
        steps: what the owner saw and did, where the session watches.
        scores: what the owner made of each layer so far, where it says what stays.
        acts: whether the owner lets go of anything, or hides it from decoding.
    """

    def __init__(self, program: Program, layers: list[Any], rows: Rows, clock: Clock, *, turn: bool) -> None:
        self.program, self.layers, self.rows, self.clock = program, layers, rows, clock
        self.turn = turn
        # Asked of the model: a cache that was made without its configuration holds everything, whatever its layers may see.
        self._sliding = frozenset(program.traits.sliding)
        self.cached: list[Layout] = []
        self.steps: list[Step] = []
        self.acts = False
        self.scores: list[Tensor | None] = []
        self._scored: list[Layout] = []
        self._unscored: dict[int, dict[Signal, Any]] = {}
        for layer in layers if turn else ():
            if isinstance(layer, FoveateLayer):
                layer.widen()
        self._before = {n: layer.ledger for n, layer in enumerate(layers) if turn and self._is_full(n)}
        self.scoring = program.cache is not None and rows.given > 1 and turn and self._whole

    @property
    def _whole(self) -> bool:
        """Whether a layout can say what the layers hold, and the owner should say what of it stays.

        It should where nothing was compressed yet, and where pictures come.
        """
        held = [layer for number, layer in enumerate(self.layers) if self._is_full(number)]
        dense = all(layer.store is None and _same_for_all_heads(layer.ledger) for layer in held)
        return dense and (self.rows.has_pictures or all(layer.ledger.complete for layer in held))

    def _is_full(self, layer: int) -> bool:
        """Whether a layer has attention over more than the last tokens."""
        return isinstance(self.layers[layer], FoveateLayer) and layer not in self._sliding

    def skip(self) -> None:
        """A layer without a cache of keys and values."""
        self.cached.append(self.rows.layout)
        self._scored.append(self.rows.layout)
        self.scores.append(None)

    def wrote(self, layer: int, route: Route | None, seen: Mapping[Signal, Any]) -> None:
        """A layer has written its rows: score it for the owner, who may let go of some or choose what decoding reads."""
        method, cache, layout = self.program.cache, self.layers[layer], self.rows.layout
        if route is not None and route.skips:
            layout = layout.after(Edit(route.active, live=route.counts, visual=route.plan.visual))
            every = behind(route.active, cache.keys.shape[2] - route.active.shape[1])
            seen = {s: follow(value, every if self._is_whole(s) else route.active) for s, value in seen.items()}
        self.cached.append(layout)
        self._scored.append(layout)
        self.scores.append(None)
        if method is None or layer in self._sliding:  # which sees the last tokens only, whatever they score
            return
        if self.rows.has_pictures and layer < self.program.cut:
            self._unscored[layer] = dict(seen)
        else:
            self._score(layer, seen)

    def score_earlier(self) -> None:
        """No edit cuts finished caches any more: score those that have waited for it."""
        while self._unscored:
            self._score(*self._unscored.popitem())

    def cut(self, routes: Sequence[Plan | None]) -> None:
        """Cut the rows that are gone from the caches of finished layers, given what routed each of them."""
        finished = [layer for layer in range(len(routes)) if self._is_full(layer)]
        skipped = [(route := routes[layer]) is not None and not route.frozen for layer in finished]
        befores = {(id(self.cached[layer]), some): self.cached[layer] for layer, some in zip(finished, skipped)}
        edits = dict(zip(befores, self._rows_left([(before, some) for (_, some), before in befores.items()])))
        for layer, some in zip(finished, skipped):
            self._cut(layer, edits[id(self.cached[layer]), some])

    def _cut(self, layer: int, edit: Edit) -> None:
        cache, rows, before = self.layers[layer], self.rows, self.cached[layer]
        ledger, past = cache.ledger, cache.keys.shape[2] - before.shape[1]
        entries = rows.once("entries", (id(edit), past), lambda: behind(edit.reduction, past), keep=edit)
        after = rows.once("after", (id(before), id(edit)), lambda: before.after(edit), keep=(before, edit))
        self.cached[layer] = self._scored[layer] = after
        anchor, holes = entries.anchor[:, None], not after.dense or ledger.holes
        cut = rows.once("cut", (ledger.key, id(entries)), lambda: ledger.kept(anchor, holes), keep=(ledger, entries))
        cache.keep(anchor, holes, cut)
        for signal, value in self._unscored.get(layer, {}).items():
            self._unscored[layer][signal] = follow(value, entries if self._is_whole(signal) else edit.reduction)

    def finish(self) -> None:
        """All layers are scored: let the owner say what stays, where it has not said so yet."""
        method = self.program.cache
        if not self.scoring or method is None or method.layer_by_layer or self._packs:
            return
        with self.clock.lap("method"):
            layouts = [layout.to(self.rows.device) for layout in self._scored]
            plans = method.plan(on(self.scores, self.rows.device), layouts)
            for layer, kept in enumerate(plans):
                self._compress(layer, kept)

    # Inside.

    def _is_whole(self, signal: Signal) -> bool:
        """Whether a signal is about all entries of a layer."""
        if isinstance(signal, AttentionRows) and signal.keys == "cache":
            return True
        attention = isinstance(signal, AttentionRows | Columns)
        return self.scoring and attention and signal in self.program.cache_signals

    def _score(self, layer: int, seen: Mapping[Signal, Any]) -> None:
        method, cache = self.program.cache, self.layers[layer]
        assert method is not None
        if self.scoring:
            self._scored[layer] = self._joined(layer)
        layout = self._scored[layer]
        with self.clock.lap("method"), self.program.watching(layout, by_head=True) as scores:
            score = None
            if self.scoring:
                score = method.score(layer, cache.keys, cache.values, seen, layout)
            if self.turn and type(method).view is not Cache.view:
                self._view(method, layer, cache, seen, self.cached[layer].without_answers)
            if self.scoring and self._packs:
                self._pack(layer, method.pack(layer, cache.keys, cache.values, seen, layout))
            elif self.scoring and method.layer_by_layer:
                self._compress(layer, method.plan([score], [layout])[0])
            else:
                self.scores[layer] = score
        if scores is not None:
            self.steps.append(Step(method, Site("decoder", layer), "cache", layout, layout, scores=tuple(scores)))

    def _joined(self, layer: int) -> Layout:
        """The rows that a layer wrote, behind what it held before; answers are padding to the owner."""
        rows, written, before = self.rows, self.cached[layer], self._before[layer]
        now = rows.once("asked", id(written), lambda: written.without_answers, keep=written)
        if self.layers[layer].keys.shape[2] == now.shape[1]:
            return now
        return rows.once(  # type: ignore[no-any-return]
            "joined", (id(now), before.key), lambda: now.behind(self._there(before), self._earlier[before.key]), keep=now
        )

    def _view(self, method: Cache, layer: int, cache: FoveateLayer, seen: Mapping[Signal, Any], layout: Layout) -> None:
        ledger = cache.ledger
        tokens = ledger.dense(layout.shape[0], cache.keys.device)
        visual = ledger.is_visual(tokens)
        if any(layout.pinned):  # whose last row has the place of a visual token, whatever it is
            counts = self.rows.once("visual counts", ledger.key, lambda: tuple(visual[:, 0].sum(1).tolist()), keep=ledger)
        else:
            counts = tuple(map(sum, zip(layout.visual, self._earlier_visual[self._before[layer].key])))
        chosen = method.view(layer, Entries(tokens, visual, counts), seen, layout)
        if chosen is not None:
            self.acts = True
            cache.narrow(chosen, holes=ledger.holes or len(set(counts)) > 1)

    def _compress(self, layer: int, kept: Kept | None) -> None:
        cache, layout, method = self.layers[layer], self._scored[layer], self.program.cache
        if not isinstance(cache, FoveateLayer):
            return
        self.acts |= kept is not None
        kept, live = self._with_answers(layer, kept), tuple(map(sum, zip(layout.live, self._answers)))
        if kept is not None and kept.by_head is not None:
            entries = kept.entries.to(cache.keys.device)[..., -max(map(max, kept.by_head)) :]
            blocks = Blocks.of(cache.keys, cache.values, entries, kept.by_head)
            cache.pack(blocks, entries[..., :0], cache.ledger.packed(entries, entries[..., :0], False))
        elif kept is not None:
            counts = kept.counts or live
            holes = len(set(zip(counts, self._answers))) > 1
            cache.keep(kept.entries.to(cache.keys.device), holes=holes)
            live = counts
        if type(method).step is not Cache.step and layer not in self._sliding and cache.store is None:
            if kept is not None and kept.counts is None:
                live = tuple((kept.entries[:, 0] >= 0).sum(1).tolist())
            width = self.rows.past + self.rows.given
            cache.eviction = Eviction(live, self.rows.intake.lengths, width, cache.keys.shape[2])

    def _pack(self, layer: int, packed: Packed | None) -> None:
        cache = self.layers[layer]
        if packed is None or not isinstance(cache, FoveateLayer):
            return
        self.acts = True
        kept = self._with_answers(layer, Kept(packed.rest, packed.counts))
        assert kept is not None
        entries, rest, old = packed.entries, kept.entries.to(cache.keys.device), cache.ledger
        holes = len(set(zip(packed.counts, self._answers))) > 1
        # Layers with one layout share a ledger, if their owner gives them the same tensors.
        key, keep = (old.key, id(entries), id(packed.rest)), (old, entries, packed.rest)
        ledger = self.rows.once("packed", key, lambda: old.packed(entries.to(rest.device), rest, holes), keep=keep)
        cache.pack(packed.store, rest, ledger)

    @property
    def _packs(self) -> bool:
        return type(self.program.cache).pack is not Cache.pack

    @property
    def _answers(self) -> tuple[int, ...]:
        return self.rows.layout.answers or (0,) * self.rows.batch

    def _with_answers(self, layer: int, kept: Kept | None) -> Kept | None:
        """What is kept of a prompt, and the entries of the answer behind it, all of them."""
        written = self.cached[layer]
        if kept is None or not any(self._answers):
            return kept
        past = self._scored[layer].shape[1] - written.shape[1]
        answer = last_of(written.valid & ~written.prompt, max(self._answers))
        answer = torch.where(answer >= 0, answer + past, -1)[:, None].expand(-1, kept.entries.shape[1], -1)
        # What is missing on the left of the answer goes to the left of all.
        entries = torch.cat([kept.entries.to(answer.device), answer], dim=2).sort(dim=2).values
        counts = kept.counts and tuple(map(sum, zip(kept.counts, self._answers)))
        by_head = kept.by_head and tuple(tuple(n + more for n in of) for of, more in zip(kept.by_head, self._answers))
        return replace(kept, entries=entries, counts=counts, by_head=by_head)

    def _rows_left(self, befores: Sequence[tuple[Layout, bool]]) -> list[Edit]:
        """The edits that leave, of the rows of each layout, those alive now; of these ``some`` may not be among them.

        How many are left then is read from the device: once for all.
        """
        layout = self.rows.layout
        alive = [self._alive(before) for before, _ in befores]
        asked = [
            torch.stack([rows, rows & before.rows(*VISUAL)]).sum(2).to(self.rows.device)
            for rows, (before, some) in zip(alive, befores)
            if some
        ]
        read = iter(torch.stack(asked).tolist() if asked else ())
        counts = [map(tuple, next(read)) if some else (layout.live, layout.visual) for _, some in befores]
        return [Edit(Reduction.keeping(rows, live), live=live, visual=visual) for rows, (live, visual) in zip(alive, counts)]

    def _alive(self, before: Layout) -> Tensor:
        """``[B, N]`` bool: which rows of a layout are alive now."""
        now = self.rows.layout.origin.to(before.origin.device).contiguous()
        index = torch.searchsorted(now, before.origin.contiguous()).clamp(max=now.shape[1] - 1)
        return (now.gather(1, index) == before.origin) & (before.origin >= 0)

    # Entries from before this forward, by ledger. What the host does not know is read at once for all layers.

    def _there(self, ledger: Ledger) -> Tensor:
        """``[B, n]`` bool: no padding."""
        tokens = ledger.dense(self.rows.batch, self.rows.device)[:, 0]
        return self.rows.intake.there(tokens, self.rows.past)

    @cached_property
    def _earlier(self) -> dict[Any, tuple[int, ...]]:
        """Entries of each sample that are no padding."""
        shown = self.rows.intake.shown(self.rows.past)
        return self._counted(self._there, {of.key: shown for of in self._before.values() if of.complete})

    @cached_property
    def _earlier_visual(self) -> dict[Any, tuple[int, ...]]:
        """Visual entries of each sample."""
        rows, none = self.rows, (0,) * self.rows.batch
        return self._counted(
            lambda of: of.is_visual(of.dense(rows.batch, rows.device))[:, 0],
            {of.key: none for of in self._before.values() if of.visual is None},
        )

    def _counted(self, what: Callable[[Ledger], Tensor], known: dict[Any, tuple[int, ...]]) -> dict[Any, tuple[int, ...]]:
        asked = {of.key: what(of).sum(1) for of in self._before.values() if of.key not in known}
        read = torch.stack(list(asked.values())).tolist() if asked else ()
        return known | {key: tuple(counts) for key, counts in zip(asked, read)}


def _same_for_all_heads(ledger: Ledger) -> bool:
    return ledger.prefix is None or ledger.prefix.shape[1] == 1
