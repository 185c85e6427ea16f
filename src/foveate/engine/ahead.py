"""Decoder layers that run ahead on rows of a method's own (`foveate.core.signal.Function`, ``through``).

The model itself says what each layer is called with: its forward runs once with layers that do nothing but note it. So
masks, windows, images that see both ways and rotary tables are the model's own, whatever a family knows; of these each layer
gets what belongs to the rows that are there, as in the forward proper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from foveate.engine.cache import FoveateLayer
from foveate.engine.run import Forward, Run
from foveate.engine.stored import Turning, attend
from foveate.ops.gradients import constant


class Host(Protocol):
    """Says what runs in the decoder layers: the call of the model."""

    run: Any


class Ahead:
    """Stands in for a `Run` while layers run ahead of it: plain, and without writing to the cache."""

    def __init__(self, host: Host, run: Run) -> None:
        self._host, self._run = host, run
        self._layers: list[tuple[Forward, tuple[Any, ...], dict[str, Any]]] = []
        self._constants: dict[int, tuple[Tensor, Tensor]] = {}
        self._turning = Turning()
        self._noting = True

    def through(self, layer: int, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """Note what decoder ``layer``, whose own forward this is, is called with; its rows pass by."""
        assert self._noting, "layers that run ahead are called by their own forward"
        self._layers.append((forward, args[1:], kwargs))
        x: Tensor = args[0]
        return x

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
    ) -> Tensor | None:
        """Nobody watches; where some of the earlier entries are in a store, the attention's output."""
        turn = self._turning.of(self._run.program.anatomy, layer)
        return attend(self._run.keeping.layers[layer], query, key, value, mask, scale, turn)

    @torch.no_grad()
    def note(self, model: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        """Let the language model, whose own forward this is, say what its layers are called with."""
        with self._standing():
            model(**kwargs, return_dict=True)
        self._noting = False

    def states(self, layer: int | None, x: Tensor) -> Tensor:
        """What would enter decoder ``layer`` if ``x`` ``[B, N, D]`` entered the first one."""
        run, rows = self._run, self._run.rows
        assert not run.layouts, "through: at the site sequence only, before the first layer"
        home, levels = rows.device, run.state.get("prefill", "deepstack")
        with self._standing():
            for number, (forward, args, kwargs) in enumerate(self._layers[:layer]):
                device = run.program.devices[number]
                x = x if device is None else x.to(device)
                rows.go(x.device)
                with rows.said():
                    x = forward(x, *args, **self._called_with(number, x, kwargs))
                if levels is not None and number < levels.shape[2]:
                    x = x + levels[:, :, number].to(x.device, x.dtype)
        rows.go(home)
        return x.to(home)

    @contextmanager
    def _standing(self) -> Iterator[None]:
        before, self._host.run = self._host.run, self
        try:
            yield
        finally:
            self._host.run = before

    def _called_with(self, layer: int, x: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        cache = self._run.keeping.layers[layer]
        old = cache.ledger
        given = self._run.rows.given_to(layer, x, kwargs, old, self._run.rows.extended(old))
        # An argument's name differs from family to family, and an empty cache need not be there at all.
        earlier = _Earlier(cache) if cache.columns or cache.store is not None else None
        caches = {name: earlier for name in ("past_key_values", "layer_past") if name in given}
        return {name: self._constant(value) for name, value in given.items()} | caches

    def _constant(self, value: Any) -> Any:
        """As autograd may save it: what was made in inference mode is copied, once."""
        if isinstance(value, tuple):
            return tuple(map(self._constant, value))
        if not isinstance(value, Tensor) or not value.is_inference():
            return value
        if id(value) not in self._constants:
            self._constants[id(value)] = value, constant(value)
        return self._constants[id(value)][1]


class _Earlier:
    """A layer's cache as one that attention may read, and that forgets what it is given."""

    def __init__(self, cache: FoveateLayer) -> None:
        self._cache = cache

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """All keys and values, the new ones last."""
        cache: Any = self._cache
        return torch.cat([cache.keys, keys], dim=2), torch.cat([cache.values, values], dim=2)


def offer(host: Host, run: Run, model: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
    """Let methods of ``run`` have layers run ahead; ``kwargs`` are what the language ``model`` is to be called with."""
    ahead = Ahead(host, run)
    ahead.note(model, kwargs)
    run.signals.seen |= {signal: functools.partial(ahead.states, signal.layer) for signal in run.program.ahead}
