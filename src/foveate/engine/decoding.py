"""Steps of decoding: one row for each sample, behind a cache whose layers may hold different tokens.

What a layer has to be called with instead (a mask, rotary tables) is made once and carried from step to step, and a step for
which there is nothing to do costs nothing in the layers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.method import Cache
from foveate.engine import masks
from foveate.engine.cache import FoveateLayer
from foveate.engine.intake import Intake
from foveate.engine.ledger import Ledger
from foveate.engine.program import Program
from foveate.engine.rows import Rows, positions_of
from foveate.engine.run import attend_blocks

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

    def now(self, ledger: Ledger) -> Tensor | None:
        """Of a layer with the next token, or None where there is no more room."""
        width = self.first + ledger.tail + 1 - self.tail
        return self.mask[..., :width] if width <= self.mask.shape[-1] else None


class Decoding:
    """Steps of decoding over one cache, until something else happens to it.

    Attributes:
        busy: whether this step's layers have to be called with anything else.
        stored_by_head: whether some of them hold what only we can read.
    """

    def __init__(self, program: Program, layers: Sequence[Any], padding: Tensor | None, steady: bool) -> None:
        """``padding`` ``[B, L]``: the mask of the tokens so far, None = none is padding.

        ``steady``: from step to step only real tokens are added to it, as ``generate`` does.
        """
        self.program, self.layers, self.steady = program, layers, steady
        self.held = _held(layers)
        self._kept_alive = [(layer._ledger, layer.blocks) for layer in layers if isinstance(layer, FoveateLayer)]
        self._padding = padding
        self._columns: dict[int, _Columns] = {}
        self._rows: Rows | None = None
        own = {i: layer for i, layer in enumerate(layers) if isinstance(layer, FoveateLayer)}
        self.stored_by_head = any(layer.blocks is not None for layer in own.values())
        shifts = [layer.ledger.shift for layer in own.values()]
        self._shift = shifts[0] if all(shift is shifts[0] for shift in shifts) else None
        turned = [i for i, c in own.items() if c.ledger.shift is not None]
        self._turned = turned if self._shift is None else []
        sliding = self._sliding = frozenset(program.traits.sliding)
        gaps = [i for i, c in own.items() if not c.ledger.complete or i in sliding]
        # Eager attention gets a mask from the model even where nothing is padding.
        always = padding is not None or program.anatomy.kernel == "eager"
        self._masked = [i for i in gaps if always or own[i].ledger.holes or i in sliding]
        self._touched = {*self._masked, *self._turned}
        sliding = any(own[i].sliding_window is not None for i in self._masked)
        self._turns = bool(self._turned) or self._shift is not None or sliding
        method = program.cache
        self._evicts = method is not None and type(method).step is not Cache.step
        self.busy = bool(self._touched) or self.stored_by_head

    @classmethod
    def of(
        cls, cache: Any, program: Program, layers: Sequence[Any], past: int, padding: Tensor | None, steady: bool
    ) -> Decoding:
        """The steps that go on over ``cache``, or new ones where something else has happened to it since."""
        known: Decoding | None = cache.__dict__.get(STEPS)
        if known is None or known.program is not program or known.steady != steady or known.held != _held(layers):
            known = cls(program, layers, padding, steady)
        if known._evict(past):
            known = cls(program, layers, padding, steady)
        known._padding = padding
        cache.__dict__[STEPS] = known
        return known

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the cache goes its own way."""

    def __reduce__(self) -> Any:
        return type(None), ()

    def begin(self, kwargs: dict[str, Any], given: Tensor, past: int) -> dict[str, Any]:
        """What the language model is to be called with; ``given`` ``[B, 1, ...]`` are the new tokens."""
        self._rows = None
        if not self._turns:
            return kwargs
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
        gone = False
        for number, layer in enumerate(self.layers):
            prompt = layer.prompt if isinstance(layer, FoveateLayer) else None
            if prompt is None:
                continue
            later = past + 1 - prompt.width
            slots = [
                method.step(number, left, layer.keys.shape[2] - spare, length + later, length)
                for left, spare, length in zip(prompt.left, prompt.spare, prompt.length)
            ]
            if any(slot is not None for slot in slots):
                layer.evict(slots)
                gone = True
        return gone

    def through(self, layer: int, forward: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Run decoder ``layer``, whose own forward this is."""
        if layer not in self._touched:
            return forward(*args, **kwargs)
        x, cache = args[0], self.layers[layer]
        kwargs = dict(kwargs, position_ids=None)  # see `foveate.engine.run`
        if layer in self._turned:
            rows = self._of_rows(x.device)
            kwargs["position_embeddings"] = rows.rope(layer, x, kwargs["position_embeddings"], cache.ledger)
        if layer in self._masked:
            kwargs["attention_mask"] = self._mask(layer, kwargs.get("attention_mask"), x)
        x = forward(*args, **kwargs)
        cache.settle()
        return x

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """The output of attention over a cache that is stored by head."""
        return attend_blocks(self.layers[layer], query, key, value, mask, scale)

    # Inside.

    def _mask(self, layer: int, base: Tensor | None, x: Tensor) -> Tensor | None:
        ledger = self.layers[layer].ledger
        if base is None and not ledger.holes:
            return None
        if layer in self._sliding:  # which old tokens it sees changes with every step
            rows = self._of_rows(x.device)
            return rows.mask(base, rows.extended(ledger), x)
        columns = self._columns.get(id(ledger.prefix))
        mask = None if columns is None else columns.now(ledger)
        if mask is None:
            columns = self._columns[id(ledger.prefix)] = self._made(ledger, x)
            mask = columns.now(ledger)
        return mask

    def _made(self, ledger: Ledger, x: Tensor) -> _Columns:
        # Where heads hold different tokens, they hold as many, and none that is padding.
        tokens = ledger.dense(x.shape[0], x.device)[:, 0]
        there = tokens >= 0
        if self._padding is not None:
            real = self._padding.to(x.device, torch.bool)
            there = there & real.gather(1, tokens.clamp(0, real.shape[1] - 1))
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
    return [id(part) for c in own for part in (c, c.is_sliding or c._ledger.prefix, c._ledger.shift, c.blocks)]
