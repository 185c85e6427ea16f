"""One forward of the language model under a recipe: what happens before and after each layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Plan, Tokens
from foveate.core.roles import VISUAL
from foveate.core.signal import Question, Signal, Site
from foveate.core.state import State
from foveate.core.step import Step
from foveate.engine.arrival import arrival
from foveate.engine.cache import FoveateLayer
from foveate.engine.clock import Clock
from foveate.engine.exiting import Exiting
from foveate.engine.intake import Intake
from foveate.engine.keeping import Keeping
from foveate.engine.leaning import Leant
from foveate.engine.program import Program
from foveate.engine.route import Route
from foveate.engine.rows import Rows, unpositioned
from foveate.engine.side import ByItem
from foveate.engine.signals import ByPicture, Signals
from foveate.engine.stored import Turning, attend, watch
from foveate.engine.vision import Look
from foveate.engine.vision_signals import joined

Forward = Callable[..., Tensor]
"""The forward of a decoder layer."""


class Run:
    """One forward, from the call of the language model to its return.

    Attributes:
        rows: what is alive, where it stands and what it may see.
        signals: what was recorded.
        keeping: the cache.
        exiting: what has left before the last layer.
        turn: whether these rows are (part of) a prompt, and not tokens that are generated or tried out.
        layouts, ran, routes: for each layer: what entered it, how many rows of each sample were there and were active, and
            what a routing method said; ``layouts`` ends with what left the last one.
        acted: methods that changed what runs, the cache's owner not among them.
        slots: surviving pairs of row and expert of each sample, by layer.
        hidden: what entered the first layer and what left each, in the caller's layout; None = was not asked for, also in
            the place of a single one.
    """

    def __init__(
        self,
        program: Program,
        layers: list[Any],
        intake: Intake,
        positions: Tensor,
        looks: Sequence[Look],
        clock: Clock,
        *,
        turn: bool,
        hidden: bool | int | Sequence[int] = False,
    ) -> None:
        self.program, self.clock, self.turn = program, clock, turn
        past = next(layer for layer in layers if isinstance(layer, FoveateLayer)).get_seq_length()
        self.rows = Rows(program.anatomy, intake, positions, past)
        self.rows.by_role = program.by_role
        self.keeping = Keeping(program, layers, self.rows, clock, turn=turn)
        self.exiting = Exiting(program, self.rows, clock, turn=turn)
        self.signals = Signals(program, self.rows, whole=self.keeping.scoring)
        self.state = State(program.constants)
        self.layouts: list[Any] = []
        self.ran: list[tuple[tuple[int, ...], Any]] = []
        self.routes: list[Plan | None] = []
        self.slots: dict[int, Tensor] = {}
        self.steps = self.keeping.steps
        self.acted: set[Any] = set()
        self._leant = Leant(program, self.rows, clock, self.acted)
        self.hidden: list[Tensor | None] | None = [] if hidden else None
        self._hidden_asked = _numbers(hidden, len(program.anatomy.layers) + 1)
        self._looks = sorted(looks, key=lambda look: look.kind)  # as the intake counts them: images first
        self._route: Route | None = None
        self._turning = Turning()
        self._inside = False
        if self.rows.has_pictures:
            self.signals.seen |= {signal: ByPicture(self.rows, signal, self._gather) for signal in program.signals_by_item}
            handed = {side: [value for look in self._looks for value in look.side[side]] for side in program.side}
            self.signals.seen |= {s: ByItem(of, lambda b, j: intake.items[b][j].source) for s, of in handed.items()}
            if program.asks_companion and program.companion is not None and intake.ids is not None:
                asked = [ids[q] for ids, q in zip(intake.ids, intake.question)]
                self.signals.seen[Question()] = program.companion.question(asked)

    def take_deepstack(self, kwargs: dict[str, Any]) -> None:
        """Take over what the language model would add to visual rows after its first layers."""
        levels, where = kwargs.pop("deepstack_visual_embeds", None), kwargs.pop("visual_pos_masks", None)
        if levels is None or where is None:
            return
        device = self.rows.device
        stacked = torch.stack([level.to(device) for level in levels], dim=1)  # [visual, L, D]
        rows = stacked.new_zeros(*where.shape, *stacked.shape[1:])
        filled = rows.masked_scatter(where.to(device)[..., None, None], stacked)
        self.state.put("prefill", "deepstack", filled, rows=True)

    def through(self, layer: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run decoder ``layer``, whose own forward this is."""
        with self.timed("engine"):
            x, kwargs = self.enter(layer, args[0], kwargs)
        self._inside = True
        try:
            with self.rows.said(None if self._route is None else self._route.active):
                x = x if self.exiting.over else forward(x, *args[1:], **kwargs)
        finally:
            self._inside = False
        with self.timed("engine"):
            return self.leave(layer, x)

    def enter(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """What decoder ``layer`` is to be called with instead."""
        rows, program = self.rows, self.program
        rows.go(x.device)
        if layer == 0:
            self._note_hidden(x)
        if rows.has_pictures:
            if layer == 0:
                edit = arrival(self._looks, rows.layout)
                x = x if edit is None else self._apply(0, edit, x)
            for site, method in program.tokens.get(layer, ()):
                x = self._edit(layer, site, method, x)
            if layer == program.cut:
                self.keeping.score_earlier()
        if program.devices[layer] is not None:
            x = x.to(program.devices[layer])  # accelerate would do so later
            rows.go(x.device)
        if rows.given > 1:
            self.signals.forget(layer - 1)
            self.layouts.append(rows.layout)
            self.signals.enter(layer, x)
        cache = self.keeping.layers[layer]
        if not isinstance(cache, FoveateLayer):
            return x, self._recur(kwargs)
        plan = self._plan(layer, x)
        self.routes.append(plan)
        old = cache.ledger
        if self.exiting.over:
            self.ran.append(self.exiting.write(layer, x, cache, kwargs["position_embeddings"]))
            return x, kwargs
        if plan is not None:
            self._route = route = Route(x, rows.layout, plan)
            self.ran.append((route.counts if route.skips else rows.layout.live, route.counts))
            rope = rows.rope(layer, x, kwargs["position_embeddings"], old)
            x, mask, tables = route.enter(layer, rows, cache, kwargs.get("attention_mask"), rope)
            return x, dict(unpositioned(kwargs), attention_mask=mask, position_embeddings=tables)
        self.ran.append((rows.layout.live, rows.layout.live) if rows.given > 1 else ((), ()))
        new = rows.extended(old)
        cache.announce(new, x.shape[1])
        return x, rows.given_to(layer, x, kwargs, old, new)

    def leave(self, layer: int, x: Tensor) -> Tensor:
        """What decoder ``layer`` is to return instead of ``x``."""
        route, cache, rows = self._route, self.keeping.layers[layer], self.rows
        if route is not None:
            x = route.leave(cache, x)
        self._note_hidden(x)
        levels = self.state.get("prefill", "deepstack")
        if levels is not None and layer < levels.shape[2]:
            x = x + levels[:, :, layer].to(x.device, x.dtype)
        if self.exiting.acts and layer == len(self.program.anatomy.layers) - 1:
            x = self.exiting.close(x, self._read, self.state)
        if not isinstance(cache, FoveateLayer):
            self.keeping.skip()
            return x
        if rows.given > 1:
            if rows.has_pictures:
                self.signals.made(layer, cache, route)
            method = self.program.cache
            self.keeping.wrote(layer, route, {} if method is None else self._read(method))
            self.signals.forget_cache_rows(layer)
        cache.settle()
        self._route = None
        return x

    def finish(self, x: Tensor) -> Tensor:
        """The last hidden state in the caller's layout; dropped rows are zero."""
        self.rows.go(x.device)
        if self.rows.given > 1:
            self.layouts.append(self.rows.layout)
        self.keeping.finish()
        return self.rows.restored(x)

    def close(self) -> None:
        """Let go of what was recorded: some of it refers back to the run, which would wait for the garbage collector."""
        self.signals.seen = {}

    def weigh(self, layer: int, index: Tensor, weights: Tensor) -> Tensor:
        """Weights of the experts ``index`` ``[rows, K]`` that ``layer`` is to run with, instead of the router's."""
        if not self._inside:
            return weights  # a method calls the layer's parts itself
        rows, route = self.rows, self._route
        new, chosen = (part.unflatten(0, (rows.batch, -1)) for part in (weights, index))
        if route is not None:
            new, chosen = (route.spread.apply(part) for part in (new, chosen))
        for method in self.program.experts[layer]:
            with self.timed("method"):
                weighed = method.weigh(layer, new, chosen, rows.layout, self._read(method), self.state)
            if weighed is not None:
                self.acted.add(method)
                new = weighed.to(new.dtype)
        if rows.given > 1:
            self.slots[layer] = ((new != 0) & rows.layout.valid[..., None]).sum((1, 2))
        return (new if route is None else route.active.apply(new)).flatten(0, 1)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Watch the attention of ``layer``; its output, where some of the cache is in a store or a method adds to it."""
        cache = self.keeping.layers[layer]
        turn = self._turning.of(self.program.anatomy, layer)
        if self.rows.given > 1 and self._watches and layer in self.program.decoder_signals:
            with self.clock.lap("decoder signals"):
                self.signals.observe(layer, query, key, scale, mask, cache, self._route, turn)
        if not self.keeping.scoring and self._route is None:
            watch(cache, query, key, mask, scale, self.signals.asking(None))
        leant = self._leant.attend(layer, cache, query, key, value, mask, scale, self._read, self.state)
        return attend(cache, query, key, value, mask, scale, turn) if leant is None else leant

    def observe_half(self, layer: int, number: int, x: Tensor) -> None:
        """Input or output of a half of ``layer``."""
        # A method may also call the layer's parts itself.
        if self.rows.given > 1 and self.rows.has_pictures and layer == len(self.layouts) - 1 and self._inside:
            self.signals.observe_half(layer, number, x, self._route)

    def timed(self, name: str) -> AbstractContextManager[None]:
        """A lap of the clock; steps of decoding are too short to be timed in parts."""
        return nullcontext() if self.rows.given == 1 else self.clock.lap(name)

    # Inside.

    @property
    def _watches(self) -> bool:
        return self.rows.has_pictures or self.keeping.scoring or self.turn

    def _note_hidden(self, x: Tensor) -> None:
        if self.hidden is not None:
            self.hidden.append(self.rows.restored(x) if len(self.hidden) in self._hidden_asked else None)

    def _read(self, method: Any) -> dict[Signal, Any]:
        self.state.to(self.rows.device)
        return self.signals.read(method)

    def _gather(self, signal: Signal, sources: Sequence[int], ordinal: Tensor) -> Any:
        """A signal of grids by their numbers in the prompt; pictures and videos were encoded in calls of their own."""
        parts, places, start = list[Any](), list[int](), 0
        for look in self._looks:
            end = start + len(look.views)
            mine = [place for place, source in enumerate(sources) if start <= source < end]
            if mine:
                views = [sources[place] - start for place in mine]
                parts.append(look.signals.gather(signal, views, ordinal if len(mine) == len(sources) else ordinal[mine]))
                places += mine
            start = end
        return parts[0] if len(parts) == 1 else joined(parts, places)

    def _edit(self, layer: int, site: Site, method: Tokens, x: Tensor) -> Tensor:
        before = self.rows.layout
        with self.clock.lap("method"), self.program.watching(before) as scores:
            edit = method.edit(site, x, before, self._read(method), self.state)
        if edit is None:
            return x
        self.acted.add(method)
        if layer > 0 and any(before.pinned):
            _refuse_losing_the_end(before, layer, method, edit)
        x = self._apply(layer, edit, x)
        if scores is not None:
            self.steps.append(Step(method, site, "edit", before, self.rows.layout, edit.reduction, tuple(scores)))
        return x

    def _apply(self, layer: int, edit: Edit, x: Tensor) -> Tensor:
        self.rows.edit(edit)
        self.state.compact(edit.reduction)
        self.signals.edit(edit.reduction)
        if edit.all_layers:
            self.keeping.cut(self.routes[:layer])
        return edit.values if edit.values is not None else edit.reduction.apply(x)

    def _plan(self, layer: int, x: Tensor) -> Plan | None:
        if self.exiting.acts and (plan := self.exiting.plan(layer, x, self._read, self.state)) is not None:
            self.acted.add(self.exiting.method)
            return plan
        method = self.program.routing.get(layer)
        if method is None or not self.rows.has_pictures:
            return None
        layout = self.rows.layout
        with self.clock.lap("method"), self.program.watching(layout) as scores:
            plan = method.plan(layer, x, layout, self._read(method), self.state)
        if scores is not None:
            self.steps.append(Step(method, Site("decoder", layer), "route", layout, layout, scores=tuple(scores)))
        if plan is not None:
            self.acted.add(method)
            plan = _with_the_end(plan, layout) if any(layout.pinned) else plan
        return plan

    def _recur(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """For a layer with a recurrent state: rows that are gone were never there, padding is masked row by row."""
        layout = self.rows.layout
        self.routes.append(None)
        self.ran.append((layout.live, layout.live) if self.rows.given > 1 else ((), ()))
        if not self.rows.edited:
            return kwargs
        given = kwargs.get("attention_mask")
        if not layout.dense and self.rows.past:
            raise FoveateError(
                f"{self.program.anatomy.family}: a later turn's samples keep different numbers of rows, and padding would "
                "disturb the recurrent state; run them one at a time"
            )
        mask = None if given is None and layout.dense else layout.valid
        return dict(kwargs, position_ids=None, attention_mask=mask)


def _with_the_end(plan: Plan, before: Layout) -> Plan:
    """What predicts the next token runs through every layer: in the place of a visual row that was chosen, if one was."""
    if plan.counts is None or plan.visual is None:
        return replace(plan, active=plan.active | before.predicting, counts=None, visual=None)
    chosen, visual = before.with_predicting(plan.active, plan.visual)
    counts = tuple(n - v + k for n, v, k in zip(plan.counts, plan.visual, visual))
    return replace(plan, active=chosen | (plan.active & ~before.rows(*VISUAL)), counts=counts, visual=visual)


def _refuse_losing_the_end(before: Layout, layer: int, method: Tokens, edit: Edit) -> None:
    """Before the first layer another row may take the place of the one that predicts; later that one has begun to."""
    stays = (edit.reduction.anchor == before.last).any(1).tolist()
    if any(ends and not stay for ends, stay in zip(before.pinned, stays)):
        raise FoveateError(
            f"input_ids: the prompt ends in its picture, whose last row predicts the next token, and {method.name} does "
            f"away with it before layer {layer}; put text behind the picture"
        )


def _numbers(asked: bool | int | Sequence[int], count: int) -> frozenset[int]:
    """Which of ``count`` hidden states are asked for: all, none, or some by number (negative: from the end)."""
    numbers = range(count)
    if isinstance(asked, bool):
        return frozenset(numbers if asked else ())
    chosen = [asked] if isinstance(asked, int) else asked
    return frozenset(numbers[number] for number in chosen if -count <= number < count)
