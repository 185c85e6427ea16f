"""Where to begin: what probes of the model point at, then every method once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields
from typing import Any

from foveate.bench.probes import Hints
from foveate.core.method import Method
from foveate.core.recipe import Recipe, build
from foveate.tune.space import KEEP, Space


def first_recipes(space: Space, hints: Hints, starts: Sequence[float]) -> Iterator[Recipe]:
    """Recipes to begin with: what the hints point at, then every method, with every choice that it has and at each budget.

    Choices are tried one at a time, at the first of ``starts``.
    """
    plain = [build(name, {}) for name in space.methods]
    if hints.horizon is not None and hints.horizon > 0:
        for method in plain:
            if _in_decoder(method) and _takes(method, "layer", "keep"):
                yield _with(method, layer=hints.horizon, keep=KEEP.low)
    if hints.dead_share:
        alive = float(f"{max(1 - hints.dead_share, KEEP.low):.2g}")
        for method in plain:
            if not _in_decoder(method) and method.takes_budget():
                yield _with(method, **_budget(method, alive))
    for start in starts:
        yield from (_with(method, **_budget(method, start)) for method in plain)
        if start == starts[0]:
            yield from (
                _with(method, **_budget(method, start), **choice) for method in plain for choice in _choices(space, method)
            )


def _in_decoder(method: Method) -> bool:
    return method.group == "in_llm"


def _takes(method: Method, *names: str) -> bool:
    return set(names) <= {field.name for field in fields(method)}


def _budget(method: Method, keep: float) -> dict[str, Any]:
    return {method.budgeted: keep} if method.takes_budget() else {}


def _choices(space: Space, method: Method) -> Iterator[dict[str, Any]]:
    """Each value other than the default of everything that is chosen from a list."""
    for dimension in space.methods[method.name]:
        if isinstance(dimension.values, tuple):
            others = (value for value in dimension.values if value != getattr(method, dimension.name))
            yield from ({dimension.name: value} for value in others)


def _with(method: Method, **parameters: Any) -> Recipe:
    return Recipe((build(method.name, parameters),))
