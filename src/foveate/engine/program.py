"""A checked recipe, sorted by the places where it acts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor

from foveate.core.companion import Companion
from foveate.core.exits import Exits
from foveate.core.layout import Layout
from foveate.core.leaning import Leaning
from foveate.core.method import Cache, Experts, Method, Pictures, Routing, Tokens
from foveate.core.ranking import collecting
from foveate.core.recipe import Recipe
from foveate.core.reuse import Reuse
from foveate.core.signal import (
    Aligned,
    Columns,
    Features,
    Function,
    Halves,
    Heard,
    Hidden,
    Ids,
    KeyValue,
    Numbers,
    Pixels,
    QueryKey,
    Question,
    Rows,
    Scorer,
    Seed,
    Side,
    Signal,
    Site,
    Summary,
    on,
)
from foveate.core.traits import Traits
from foveate.engine.clock import reader
from foveate.engine.functions import function
from foveate.engine.presses import Pressing
from foveate.engine.stand_in import compiled
from foveate.models.anatomy import Anatomy


class Program:
    """A checked recipe, sorted by the places where it acts.

    Attributes:
        recipe: as it was given; ``methods``: its methods, fitted to the model; ``anatomy``, ``traits``: the model's.
        home: where the model runs; ``now``: says when it is there.
        companion: a text tower beside the model.
        pictures: methods that act on pictures before the processor, in recipe order.
        reshaped: those of them that have changed a picture; None if no picture came by them yet.
        constants: what methods find in their `State` at any time.
        reuse: the method that lets blocks of the encoder run in part; ``reused``: which blocks. One whose
            attention is read runs whole.
        vision: methods that act on pictures, by kind, layer and part of the site, in recipe order.
        tokens: methods that edit the sequence before each decoder layer (the sequence site is layer 0), in recipe order.
        routing: the method that routes each decoder layer.
        leaning: methods that add to the attention of pairs in each decoder layer, in recipe order.
        experts: methods that weigh the experts of each decoder layer, in recipe order.
        exits: the method by which rows leave before the last layer; ``exit_layers``: before which layers they may.
        cache: the owner of the cache.
        cut: decoder layer before which rows may go from the caches of all earlier layers for the last time, 0 = none.
        reads: the signals of each method, in its own order.
        cache_signals: signals that the owner of the cache alone reads.
        encoder_signals, decoder_signals: what to record in each layer's attention.
        features: what to keep of what the projector is fed.
        summary: whether the encoder's summary rows are read.
        pixels: whether the pixels of each token are to be kept.
        signals_by_item: signals of pictures.
        side: side data that is read.
        halves, hidden, key_value: decoder layers of which these are read.
        given: functions, numbers and the seed, which no forward changes.
        ahead: functions that run layers ahead, which are of one forward.
        compiled: decoder layers that are compiled one by one.
        devices: where each decoder layer is run, if accelerate says so.
        asks_companion: whether the question's embedding is read; ``asks_ids``: whether the tokens' ids are.
        hears: whether what the encoder of sound attends to is read.
        passing: signals of encoder blocks that are only read at sites of their own block.
        retain: whether the signals of all layers are to be there at the end (calibration).
        watched: whether each step of a method is to be remembered (inspection).
    """

    def __init__(
        self, recipe: Recipe, anatomy: Anatomy, traits: Traits, *, seed: int = 0, companion: Companion | None = None
    ) -> None:
        methods: tuple[Any, ...] = tuple(method.fitted(traits) for method in recipe.methods)
        self.recipe, self.methods, self.anatomy, self.traits, self.companion = recipe, methods, anatomy, traits, companion
        self.home, self.now = anatomy.home, reader(anatomy.home)
        self.pictures = tuple(method for method in methods if isinstance(method, Pictures))
        self.reshaped: set[Method] | None = None
        self.constants: dict[str, Any] = {"seed": seed, "traits": traits}
        self.reads: dict[Any, tuple[Signal, ...]] = {method: method.reads(traits) for method in methods}
        self.reuse: Reuse | None = None
        self.reused: tuple[int, ...] = ()
        self.vision: dict[tuple[str, int, str], list[Tokens]] = {}
        self.tokens: dict[int, list[tuple[Site, Tokens]]] = {}
        self.routing: dict[int, Routing] = {}
        self.leaning: dict[int, list[Leaning]] = {}
        self.experts: dict[int, list[Experts]] = {}
        self.exits: Exits | None = None
        self.exit_layers: frozenset[int] = frozenset()
        self.cache: Cache | None = None
        self.cut = 0
        # The sequence site comes before decoder[0]; within a site, recipe order.
        for kind in ("sequence", "decoder"):
            for method in (m for m in methods if isinstance(m, Tokens)):
                for site in (s for s in method.sites(traits) if s.kind == kind):
                    self.tokens.setdefault(site.layer, []).append((site, method))
                    self.cut = max(self.cut, site.layer) if method.cuts_caches else self.cut
        for method in methods:
            if isinstance(method, Tokens):
                for site in (s for s in method.sites(traits) if s.in_vision):
                    self.vision.setdefault((site.kind, site.layer, site.part), []).append(method)
            if isinstance(method, Reuse) and method.reused(traits):
                self.reuse = method
            if isinstance(method, Routing):
                self.routing.update(dict.fromkeys(method.routed(traits), method))
            if isinstance(method, Leaning):
                for layer in method.leaned(traits):
                    self.leaning.setdefault(layer, []).append(method)
            if isinstance(method, Experts):
                for layer in method.weighed(traits):
                    self.experts.setdefault(layer, []).append(method)
            if isinstance(method, Exits) and (layers := method.exits(traits)):
                self.exits, self.exit_layers = method, frozenset(layers)
                self.constants[method.name] = method.memory(traits)
            if isinstance(method, Cache):
                self.cache = method

        read_by_others = {s for method, signals in self.reads.items() if method is not self.cache for s in signals}
        self.cache_signals = set(self.reads.get(self.cache, ())) - read_by_others
        self.decoder_signals: dict[int, list[Signal]] = {}
        self.encoder_signals: dict[int, list[Signal]] = {}
        self.features: list[Signal] = []
        self.summary = False
        self.pixels = False
        self.signals_by_item: set[Signal] = set()
        self.hidden: set[int] = set()
        self.halves: set[int] = set()
        self.key_value: set[int] = set()
        self.side: list[Side] = []
        self.asks_companion = self.asks_ids = self.hears = False
        self.packed: list[Any] = []  # what stands for linears (`foveate.engine.packed.PackedLinear`)
        self.by_role = ""  # the method of which some depend on what each row is
        self.retain = False
        self.watched = False
        self.compiled = {number for number, layer in enumerate(anatomy.layers) if compiled(layer)}
        self.devices = [anatomy.device(layer) for layer in range(len(anatomy.layers))]
        recurrent = set(traits.recurrent)
        every = dict.fromkeys(
            signal for signals in self.reads.values() for signal in signals if recurrent.isdisjoint(layers_of(signal))
        )
        functions = [signal for signal in every if isinstance(signal, Function)]
        self.ahead = tuple(signal for signal in functions if signal.name == "through")
        self.given: dict[Signal, Any] = {s: function(anatomy, s) for s in functions if s not in self.ahead}
        self.given |= {
            s: on(dict(traits.artifacts[s.method].numbers), anatomy.home) for s in every if isinstance(s, Numbers)
        }
        presses = {text: Pressing(anatomy, text) for text in dict.fromkeys(s.press for s in every if isinstance(s, Scorer))}
        self.given |= {s: seed for s in every if isinstance(s, Seed)}
        self.given |= {s: presses[s.press].on(s.layer) for s in every if isinstance(s, Scorer)}
        for signal in every:
            self._sort(signal)
        if self.reuse is not None:
            self.reused = tuple(layer for layer in self.reuse.reused(traits) if layer not in self.encoder_signals)
        self.passing: list[Any] = [s for signals in self.encoder_signals.values() for s in signals if self._passes(s)]

    def watching(self, layout: Layout, by_head: bool = False) -> AbstractContextManager[list[Tensor] | None]:
        """What rows of ``layout`` are ranked by meanwhile, if somebody wants to know."""
        return collecting(layout.shape, by_head) if self.watched else nullcontext()

    def _passes(self, signal: Any) -> bool:
        """Whether all who read it act in its block."""
        block = ("encoder", signal.site.layer)
        return all(
            isinstance(method, Tokens) and any((site.kind, site.layer) == block for site in method.sites(self.traits))
            for method, signals in self.reads.items()
            if signal in signals
        )

    def _sort(self, signal: Signal) -> None:
        if isinstance(signal, Features | Aligned):
            self.features.append(signal)
            self.signals_by_item.add(signal)
        elif isinstance(signal, Side):
            self.side.append(signal)
        elif isinstance(signal, Summary):
            self.summary = True
        elif isinstance(signal, Pixels):
            self.pixels = True
            self.signals_by_item.add(signal)
        elif isinstance(signal, Question):
            self.asks_companion = True
        elif isinstance(signal, Ids):
            self.asks_ids = True
        elif isinstance(signal, Heard):
            self.hears = True
        elif isinstance(signal, Hidden | Halves | KeyValue):
            kinds: dict[type, set[int]] = {Hidden: self.hidden, Halves: self.halves, KeyValue: self.key_value}
            kinds[type(signal)].add(signal.site.layer)
        elif not isinstance(signal, Function | Scorer | Numbers | Seed):
            encoder = signal.site.kind == "encoder"
            (self.encoder_signals if encoder else self.decoder_signals).setdefault(signal.site.layer, []).append(signal)
            if encoder:
                self.signals_by_item.add(signal)


def layers_of(signal: Signal) -> Sequence[int]:
    """The decoder layers whose attention a signal needs."""
    if isinstance(signal, Function) and signal.layer is not None:
        return range(signal.layer) if signal.name == "through" else (signal.layer,) if signal.name == "query_key" else ()
    if isinstance(signal, Scorer):
        return (signal.layer,)
    if isinstance(signal, Rows | Columns | QueryKey | KeyValue) and signal.site.kind == "decoder":
        return (signal.site.layer,)
    return ()
