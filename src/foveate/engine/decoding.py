"""Steps of decoding: one row for each sample, behind a cache whose layers may hold different tokens.

What a layer has to be called with instead (a mask, rotary tables) is made once and carried from step to step, and a step for
which there is nothing to do costs nothing in the layers.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.method import Cache
from foveate.engine import masks
from foveate.engine.cache import FoveateLayer
from foveate.engine.intake import Intake
from foveate.engine.ledger import Ledger
from foveate.engine.program import Program
from foveate.engine.rows import Rows, positions_of
from foveate.engine.stored import Turning, attend

STEPS = "_foveate_steps"
"""Attribute of a cache: the steps of decoding that go on over it."""
SLACK = 64
"""Columns of later tokens that a mask is made with."""


@dataclass
class _Columns:
    """Which entries of a layer are no padding, with room for those of later steps.

    Attributes:
        mask: as the kernel wants it, ``[B, 1, 1, m]`` (``[B, m]`` for FlashAttention).
        first: entries for which it was made.
        tail: consecutive ones among them.
    """

    mask: Tensor
    first: int
    tail: int

    def now(self, ledger: Ledger, coming: int = 1) -> Tensor | None:
        """Of a layer with ``coming`` tokens more, or None where there is no more room."""
        width = self.first + ledger.tail + coming - self.tail
        return self.mask[..., :width] if width <= self.mask.shape[-1] else None


class Decoding:
    """Steps of decoding over one cache, until something else happens to it.

    Attributes:
        busy: whether this step's layers have to be called with anything else.
        stored: whether some of them hold what only we can read.
    """

    def __init__(self, program: Program, layers: Sequence[Any], padding: Tensor | None, steady: bool) -> None:
        """``padding`` ``[B, L]``: the mask of the tokens so far, None = none is padding.

        ``steady``: from step to step only real tokens are added to it, as ``generate`` does.
        """
        # The cache keeps this, and must not keep the model.
        self._program = weakref.ref(program)
        self.layers, self.steady = layers, steady
        self.held = _held(layers)
        self._kept_alive = [(layer._ledger, layer.store) for layer in layers if isinstance(layer, FoveateLayer)]
        self._padding = padding
        self._table: tuple[Tensor, Tensor] | None = None
        self._columns: dict[int, _Columns] = {}
        self._rows: Rows | None = None
        self._turning = Turning()
        own = {i: layer for i, layer in enumerate(layers) if isinstance(layer, FoveateLayer)}
        self.stored = any(layer.store is not None for layer in own.values())
        shifts = [layer.ledger.shift for layer in own.values()]
        self._shift = shifts[0] if all(shift is shifts[0] for shift in shifts) else None
        distinct = list({id(shift): shift for shift in shifts}.values()) if self._shift is None else []
        still = next((torch.zeros_like(shift) for shift in distinct if shift is not None), None)
        self._turned = {} if still is None else {i: _place(c.ledger.shift, distinct) for i, c in own.items()}
        if still is not None:
            self._shifts = torch.stack([still if shift is None else shift.to(still.device) for shift in distinct])
        self._tables: dict[Any, Any] = {}
        sliding = self._sliding = frozenset(program.traits.sliding)
        gaps = [i for i, c in own.items() if not c.ledger.complete or i in sliding]
        # Eager attention gets a mask from the model even where nothing is padding.
        always = padding is not None or program.anatomy.kernel == "eager"
        self._masked = [i for i in gaps if always or own[i].ledger.holes or i in sliding]
        self._touched = {*self._masked, *self._turned}
        self._turns = bool(self._turned) or self._shift is not None or not sliding.isdisjoint(self._masked)
        method = program.cache
        self._evicts = method is not None and type(method).step is not Cache.step
        self.busy = bool(self._touched) or self.stored

    @classmethod
    def of(
        cls, cache: Any, program: Program, layers: Sequence[Any], past: int, padding: Tensor | None, steady: bool
    ) -> Decoding:
        """The steps that go on over ``cache``, or new ones where something else has happened to it since."""
        known: Decoding | None = cache.__dict__.get(STEPS)
        if known is None or known._program() is not program or known.steady != steady or known.held != _held(layers):
            known = cls(program, layers, padding, steady)
        if known._masked and padding is not None and padding.shape[1] != past + 1:
            raise FoveateError(
                f"attention_mask: has {padding.shape[1]} columns; must have one for each of the {past + 1} tokens so far"
            )
        if known._evict(past):
            known = cls(program, layers, padding, steady)
        known._padding, known._table = padding, None
        if not steady and padding is not None:
            known._columns = {}
        cache.__dict__[STEPS] = known
        return known

    @property
    def program(self) -> Program:
        """What runs."""
        program = self._program()
        assert program is not None
        return program

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the cache goes its own way."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def begin(self, kwargs: dict[str, Any], given: Tensor, past: int) -> dict[str, Any]:
        """What the language model is to be called with; ``given`` ``[B, 1, ...]`` are the new tokens."""
        self._rows = None
        if not self._turns:
            return kwargs
        self._tables = {}
        batch, device = given.shape[0], given.device
        self._past, self._positions = past, positions_of(kwargs.get("position_ids"), batch, 1, past, device)
        if self._shift is None:
            return kwargs
        moved = self._moved(self._shift)
        given = kwargs.get("position_ids")
        return dict(kwargs, position_ids=moved if given is not None and given.ndim == 3 else moved[0])

    def _evict(self, past: int) -> bool:
        """Let the owner of the cache evict step by step; whether anything went."""
        method = self.program.cache
        if not self._evicts or method is None:
            return False
        found: list[tuple[FoveateLayer, list[int]]] = []
        for number, layer in enumerate(self.layers):
            eviction = layer.eviction if isinstance(layer, FoveateLayer) else None
            if eviction is None:
                continue
            held, later = eviction.held(layer.columns), past + 1 - eviction.width
            slots = [
                method.step(number, left, count, length + later, length)
                for left, count, length in zip(eviction.left, held, eviction.length)
            ]
            places = eviction.places(slots)
            if places is not None:
                found.append((layer, places))
        if found:
            table = upload([places for _, places in found], found[0][0].keys.device)
            for (layer, places), there in zip(found, table.unbind(0)):
                layer.write_to(there.to(layer.keys.device, non_blocking=True), max(places) == layer.columns)
        return bool(found)

    def through(self, layer: int, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run decoder ``layer``, whose own forward this is."""
        if layer not in self._touched:
            return forward(*args, **kwargs)
        x, cache = args[0], self.layers[layer]
        kwargs = dict(kwargs, position_ids=None)  # see `foveate.engine.run`
        if layer in self._turned:
            kwargs["position_embeddings"] = self._rope(layer, x)
        if layer in self._masked:
            kwargs["attention_mask"] = self._mask(layer, kwargs.get("attention_mask"), x)
        x = forward(*args, **kwargs)
        cache.settle()
        return x

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """The output of attention over a cache some of which is in a store."""
        return attend(self.layers[layer], query, key, value, mask, scale, self._turning.of(self.program.anatomy, layer))

    # Inside.

    def _rope(self, layer: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary tables of a layer; those of all layers, by how much they move tokens down, are made at once."""
        anatomy = self.program.anatomy
        kind = (anatomy.config.layer_types[layer] if anatomy.typed_rotary else None, x.device)
        if kind not in self._tables:
            positions = self._positions.to(x.device)
            moved = (positions[:, None] - self._shifts.to(x.device)[..., None]).clamp(min=0)
            tables = anatomy.rotary(layer, x, moved.flatten(1, 2))
            self._tables[kind] = tuple(table.unflatten(0, moved.shape[1:3]).unbind(0) for table in tables)
        cos, sin = self._tables[kind]
        return cos[self._turned[layer]], sin[self._turned[layer]]

    def _mask(self, layer: int, base: Tensor | None, x: Tensor) -> Tensor | None:
        ledger = self.layers[layer].ledger
        if base is None and not ledger.holes:
            return None
        if layer in self._sliding:  # which old tokens it sees changes with every step
            rows = self._of_rows(x.device)
            return rows.mask(base, rows.extended(ledger), x)
        if self.layers[layer].writes:  # the next token has its place already, and one entry is another with every step
            return self._made(ledger, x, taken=True).now(ledger, coming=0)
        columns = self._columns.get(id(ledger.prefix))
        mask = None if columns is None else columns.now(ledger)
        if mask is None:
            columns = self._columns[id(ledger.prefix)] = self._made(ledger, x)
            mask = columns.now(ledger)
        return mask

    def _real(self, tokens: Tensor) -> Tensor:
        """Which of ``tokens`` ``[B, n]`` are there, and no padding."""
        if self._padding is None:
            return tokens >= 0
        if self._table is None:  # with a column behind the last one, which tokens that are not there, -1, find
            real = torch.nn.functional.pad(self._padding.to(tokens.device, torch.bool), (0, 1))
            self._table = real, torch.arange(len(real), device=real.device)[:, None]
        real, sample = (part.to(tokens.device) for part in self._table)
        return real[sample, tokens]

    def _made(self, ledger: Ledger, x: Tensor, taken: bool = False) -> _Columns:
        # Where heads hold different tokens, they hold as many, and none that is padding.
        tokens = ledger.dense(x.shape[0], x.device)[:, 0]
        there = self._real(tokens)
        if not taken:
            there = torch.nn.functional.pad(there, (0, SLACK), value=True)
        kernel = self.program.anatomy.kernel
        if "flash" in kernel:
            return _Columns(there, tokens.shape[1], ledger.tail)
        mask = there[:, None, None]
        return _Columns(masks.additive(mask, x) if kernel == "eager" else mask, tokens.shape[1], ledger.tail)

    def _moved(self, shift: Tensor) -> Tensor:
        return (self._positions - shift.to(self._positions.device)[:, None]).clamp(min=0)

    def _of_rows(self, device: torch.device) -> Rows:
        if self._rows is None:
            intake = Intake.plain(*self._positions.shape[1:])
            self._rows = Rows(self.program.anatomy, intake, self._positions, self._past)
        self._rows.go(device)
        return self._rows


def _held(layers: Sequence[Any]) -> list[int]:
    """The same as long as nothing but steps of decoding happens to a cache."""
    # One comprehension and no call for each layer: this runs in every step.
    # What has left a sliding window makes no difference: nothing that depends on it is carried to the next step.
    own = [layer for layer in layers if type(layer) is FoveateLayer]
    return [id(part) for c in own for part in (c, c.is_sliding or c._ledger.prefix, c._ledger.shift, c.store)]


def _place(one: Any, among: Sequence[Any]) -> int:
    """Which of some objects this very one is."""
    return next(place for place, other in enumerate(among) if other is one)
