"""What one prompt and its answer cost, and which tokens lived through it."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.report import Report, Trace
from foveate.core.shape import Shape
from foveate.core.step import Held, Step
from foveate.core.weights import Weights
from foveate.engine.cache import FoveateLayer
from foveate.engine.clock import Clock
from foveate.engine.exiting import Exiting
from foveate.engine.flops import prefill_flops
from foveate.engine.intake import Intake
from foveate.engine.program import Program
from foveate.engine.run import Run
from foveate.engine.vision import Look


class Recording:
    """What one prompt and its answer cost, and which tokens lived through it.

    Attributes:
        clock: seconds of its parts.
        trace: which visual tokens were alive where.
        kv_bytes: of the cache, by layer, at the end of the last call.
    """

    def __init__(self, program: Program) -> None:
        self.clock = Clock(program.home)
        self.trace = Trace()
        self.kv_bytes: tuple[int, ...] = ()
        self.kv_kept: tuple[float, ...] = ()
        self._program = program
        self._cache: weakref.ref[Any] | None = None
        self._prefill: list[Layout] = []
        self._ran: list[tuple[Any, Any]] = []
        self._slots: dict[int, Tensor] = {}
        self._encoded = (0, 0)
        self._written: list[Layout] = []
        self._acted: set[Any] = set()
        self._layers = [0, 0]

    def prompt(self, run: Run, looks: Sequence[Look]) -> None:
        """A forward read a prompt, or a part of it."""
        self._acted.update(run.acted, *(look.acted for look in looks), {self._program.cache} if run.keeping.acts else ())
        again = run.rows.past == 0 and bool(self._prefill)  # without a cache, with every token
        if again:
            self.trace.log, self.trace.routes = [], []
        if run.rows.has_pictures or not self._prefill:
            if not again:
                self._note(run.layouts, run.ran, run.slots, looks)
            if any(run.layouts[0].items):
                self.trace.log.append(run.layouts)
                self.trace.routes.append(run.routes)
        if self._program.watched:
            self._remember(run, looks)

    def left(self, exiting: Exiting) -> None:
        """A forward let rows leave before the last layer, or could have."""
        self._layers[0] += exiting.ran
        self._layers[1] += exiting.possible

    def unmodified(self, intake: Intake, positions: Tensor, looks: Sequence[Look]) -> None:
        """A forward without a recipe read a prompt, or a part of it."""
        layout, layers = intake.layout(positions), len(self._program.anatomy.layers)
        self._note([layout] * (layers + 1), [(layout.live, layout.live)] * layers, {}, looks)
        if any(layout.items):
            self.trace.log.append([layout] * (layers + 1))
            self.trace.routes.append([None] * layers)

    def holds(self, cache: Any, now: bool) -> None:
        """What to count: the layers of ``cache``, ``now`` or, if the cache lives as long, when somebody asks."""
        self._cache = None if now else weakref.ref(cache)
        if now or not self.kv_bytes:
            self._count(cache.layers)

    def _count(self, layers: Sequence[Any]) -> None:
        self.kv_bytes = tuple([_bytes(layer) for layer in layers])
        self.kv_kept = tuple([_kept(layer) for layer in layers])

    def report(self) -> Report:
        """What it cost."""
        layouts, clock, program = self._prefill, self.clock, self._program
        cache = None if self._cache is None else self._cache()
        if cache is not None:
            self._count(cache.layers)
        entering = layouts[:-1]
        samples = max((len(layout.live) for layout in entering), default=0)

        def mean(counts: tuple[int, ...]) -> float:
            return sum(counts) / len(counts)

        full = [tuple(n - v + all_ for n, v, all_ in zip(lay.live, lay.visual, lay.originals)) for lay in entering[:1]]
        before = full * len(entering)  # text is there in every layer
        live = [rows for rows, _ in self._ran]
        active = [running for _, running in self._ran]
        visual = [
            tuple(v - (n - rows) for v, n, rows in zip(lay.visual, lay.live, there)) for lay, there in zip(entering, live)
        ]
        chosen = self._chosen(active)
        ran = chosen | {layer: tuple(slots.tolist()) for layer, slots in self._slots.items()}
        every = sum(map(sum, chosen.values()))
        config = program.anatomy.config
        return Report(
            recipe=str(program.recipe),
            idle=self._idle(entering[0]) if entering else (),
            largest_grid=max((item.count for items in entering[0].items for item in items), default=0) if entering else 0,
            samples=samples,
            original_visual_tokens=mean(entering[0].originals) if entering else 0.0,
            visual_tokens=tuple(map(mean, visual)),
            rows=tuple(map(mean, live)),
            active=tuple(map(mean, active)),
            kv_bytes=self.kv_bytes,
            kv_kept=self.kv_kept,
            workspace=sum(method.workspace(self._shape(before[0])) for method in program.methods) if before else 0,
            encode_seconds=clock.seconds("vision") + clock.seconds("projector"),
            prefill_seconds=clock.seconds("prefill"),
            decode_seconds=clock.seconds("decode"),
            decode_steps=clock.count("decode"),
            first_token_seconds=clock.seconds("first token"),
            total_seconds=clock.seconds("call"),
            experts=sum(map(sum, ran.values())) / every if every else 1.0,
            layers=self._layers[0] / self._layers[1] if self._layers[1] else 1.0,
            weights=sum(one.linear.weight.numel() for one in program.packed),
            weight_bytes=sum(one.nbytes for one in program.packed),
            unpacked=sum(one.kernel == "rows" for one in program.packed) / max(len(program.packed), 1),
            signal_seconds=clock.seconds("encoder signals"),
            method_seconds=clock.seconds("method") + clock.seconds("decoder signals"),
            engine_seconds=max(clock.seconds("engine") - clock.seconds("method"), 0.0),
            flops=prefill_flops(config, live, active, ran),
            flops_unmodified=prefill_flops(config, before, before, self._chosen(before)),
        )

    def _idle(self, prompt: Layout) -> tuple[str, ...]:
        """The methods that found nothing to do in a prompt with pictures, or in one of a text model."""
        there = zip(self._program.recipe.methods, self._program.methods)
        acted = self._acted | (self._program.reshaped or set())
        minded = [(given, method) for given, method in there if not isinstance(method, Weights)]
        asked = any(prompt.originals) or not self._program.traits.sees
        return tuple(str(given) for given, method in minded if asked and method not in acted)

    def _note(
        self, layouts: list[Layout], ran: list[tuple[Any, Any]], slots: dict[int, Tensor], looks: Sequence[Look]
    ) -> None:
        self._prefill, self._ran, self._slots = layouts, ran, slots
        encoded = [look.encoded for look in looks]
        self._encoded = sum(count for count, _ in encoded), max((rows for _, rows in encoded), default=0)

    def _remember(self, run: Run, looks: Sequence[Look]) -> None:
        """What methods did, and what the caches hold since; for inspection."""
        trace, batch = self.trace, run.layouts[0].shape[0]
        if run.rows.has_pictures:
            self._written = self._written or run.keeping.cached
            for look in sorted(looks, key=lambda look: look.kind):
                trace.steps += [_renumbered(step, len(trace.pictures)) for step in look.steps]
                first = trace.pictures[-1] + 1 if trace.pictures else 0
                trace.pictures += [first + number for number, picture in enumerate(look.pictures) for _ in picture.views]
        trace.steps += run.steps
        trace.held = [
            Held(layout, *(ledger.tokens(batch, layout.origin.device) for ledger in (cache.whole, cache.ledger)))
            if isinstance(cache, FoveateLayer)
            else None
            for layout, cache in zip(self._written, run.keeping.layers)
        ]

    def _chosen(self, active: list[Any]) -> dict[int, tuple[int, ...]]:
        """Experts that the router chooses for the active rows, by layer with experts and sample."""
        traits = self._program.traits
        return {layer: tuple(traits.experts * n for n in active[layer]) for layer in traits.sparse if active}

    def _shape(self, rows: tuple[int, ...]) -> Shape:
        """The last prompt, of so many ``rows`` before anything was dropped."""
        anatomy, traits = self._program.anatomy, self._program.traits
        config, encoder, cell = anatomy.config, anatomy.encoder, traits.cell
        heads, (images, image_rows) = config.num_attention_heads, self._encoded
        return Shape(
            samples=len(rows),
            rows=max(rows),
            visual=max(self._prefill[0].originals),
            layers=len(anatomy.layers),
            width=config.hidden_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_width=getattr(config, "head_dim", None) or config.hidden_size // heads,
            inner=max(config.intermediate_size, (traits.experts or 0) * getattr(config, "moe_intermediate_size", 0)),
            vocabulary=config.vocab_size,
            itemsize=anatomy.dtype.itemsize,
            images=images,
            image_rows=image_rows,
            image_width=encoder.width if encoder else 0,
            image_heads=encoder.heads if encoder else 0,
            cls=traits.has_cls,
            cell=math.prod(cell) if cell else 0,
            experts=traits.experts or 0,
        )


def _renumbered(step: Step, grids: int) -> Step:
    """A step with its grids counted behind so many others."""
    return replace(step, places={number + grids: place for number, place in (step.places or {}).items()})


def _bytes(layer: Any) -> int:
    if isinstance(layer, FoveateLayer):
        return layer.nbytes
    if not isinstance(getattr(layer, "keys", None), Tensor):
        return 0
    return int(layer.keys.nbytes + layer.values.nbytes)


def _kept(layer: Any) -> float:
    """Share of the tokens that a layer was shown that it holds, padding included."""
    if not isinstance(layer, FoveateLayer):
        return 1.0
    whole = layer.whole
    width = 0 if whole.prefix is None else whole.prefix.shape[2]
    # A store and the entries beside it are padded each for itself.
    return min((width + whole.tail) / whole.past, 1.0) if whole.past else 1.0
