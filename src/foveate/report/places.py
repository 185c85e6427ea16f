"""Where methods act, in a reader's words: what pictures, pages and tables of a bench are divided by."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from foveate.bench.cells import REFERENCE_POINTS
from foveate.core.description import PLACES
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

SEVERAL = "several places"
ELSEWHERE = "elsewhere"

Item = TypeVar("Item")


def place(recipe: str) -> str:
    """Where the methods of a recipe act; `ELSEWHERE` if it names a method that is not installed here."""
    try:
        groups = {method.group for method in Recipe.parse(recipe).methods}
    except FoveateError:
        return ELSEWHERE
    if len(groups) != 1:
        return SEVERAL
    (group,) = groups
    return PLACES[group].words if group in PLACES else group.replace("_", " ")


def by_place(items: Iterable[Item], recipe: Callable[[Item], str]) -> dict[str, list[Item]]:
    """The items of each place, in the order in which a request comes by; the points of reference are left out."""
    order = [*(known.words for known in PLACES.values()), SEVERAL, ELSEWHERE]
    found: dict[str, list[Item]] = {name: [] for name in order}
    for item in items:
        if recipe(item) not in REFERENCE_POINTS:
            found.setdefault(place(recipe(item)), []).append(item)
    return {name: those for name, those in found.items() if those}
