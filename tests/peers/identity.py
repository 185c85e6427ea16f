"""Recipes at which every model answers as without, put around each call of an outermost model."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from torch import Tensor

import foveate
from foveate.core.layout import Layout
from foveate.core.method import Plan, Routing, Traits
from foveate.core.recipe import Recipe, build
from foveate.core.signal import Seen
from foveate.core.state import State
from foveate.models import anatomy


@dataclass(frozen=True)
class Everyone(Routing):
    """Routes every row through every layer that can be routed; by turns the rest, which is nobody, is frozen or skips."""

    name = "everyone"
    title = "Everyone"
    group = "in_llm"
    paper = "none"

    def routed(self, traits: Traits) -> tuple[int, ...]:
        return tuple(layer for layer in range(traits.decoder_layers) if layer not in (*traits.recurrent, *traits.sliding))

    def plan(self, layer: int, x: Tensor, layout: Layout, seen: Seen, state: State) -> Plan | None:
        return Plan(layout.valid, frozen=layer % 2 == 0, counts=layout.live)


def measured(traits: Traits) -> Recipe:
    return Recipe()


def pruned(traits: Traits) -> Recipe:
    """Before and inside the language model, and in its cache."""
    layer = next(layer for layer in range(1, traits.decoder_layers) if layer - 1 not in traits.recurrent)
    chosen = {"random": {"keep": 1.0}, "fastv": {"keep": 1.0, "layer": layer}, "snapkv": {"keep": 1.0}}
    return Recipe(tuple(build(name, parameters) for name, parameters in chosen.items()))


def routed(traits: Traits) -> Recipe:
    return Recipe((Everyone(),))


def cached(traits: Traits) -> Recipe:
    return Recipe((build("prefixkv", {"keep": 1.0}),))


RECIPES: dict[str, Callable[[Traits], Recipe] | None] = {
    "plain": None,
    "measured": measured,
    "pruned": pruned,
    "routed": routed,
    "cached": cached,
}


class Attached:
    """Attaches a recipe around every call and ``generate`` of the outermost models of some classes.

    Attributes:
        calls: how many there were.
    """

    def __init__(self, recipe: Callable[[Traits], Recipe] | None) -> None:
        self.calls = 0
        self._recipe = recipe
        self._inside = False

    @contextmanager
    def around(self, classes: tuple[type, ...]) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for kind in classes:
                for name in ("__call__", "generate"):
                    patch.setattr(kind, name, self._wrapped(name, getattr(kind, name)))
            yield

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Calls run without the recipe."""
        inside, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = inside

    def _wrapped(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(model: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls += 1
            if self._inside or self._recipe is None:
                return original(model, *args, **kwargs)
            with self.paused(), foveate.attach(model, self._recipe(anatomy(model).traits())):
                return getattr(model, name)(*args, **kwargs)  # as a user would: what is attached may stand in for it

        return call
