"""Which cells a model takes at all, found out before anything is measured."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from foveate.bench.cells import Cell
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

Refusals = Callable[[Sequence[Recipe]], Sequence[str | None]]
"""Why a model refuses each of some recipes; None if it takes it."""

Admit = Callable[[Sequence[Cell], Refusals], Sequence[Cell]]
"""The cells that are to be measured, once somebody can say what the model refuses."""


def admitted(
    cells: Sequence[Cell], refusals: Refusals, named: Collection[str], left_out: Callable[[str], None]
) -> Sequence[Cell]:
    """The cells whose recipe the model takes.

    Args:
        cells: all that are planned.
        refusals: asked once for every recipe.
        named: methods that the user asked for by name.
        left_out: told in a line about each of the others that is refused.

    Raises:
        FoveateError: if a method that was named is refused.
    """
    recipes = list(dict.fromkeys(cell.recipe for cell in cells))
    reasons = {}
    for recipe, reason in zip(recipes, refusals(recipes), strict=True):
        if reason is not None:
            reasons[recipe] = reason.removeprefix(f"{str(recipe).partition('(')[0]}: ")
    refused = {(cell.method, cell.recipe): reasons[cell.recipe] for cell in cells if cell.recipe in reasons}
    wrong = [f"{recipe}: {reason}" for (method, recipe), reason in refused.items() if method in named]
    if wrong:
        more = f" (and {len(wrong) - 1} more that the model refuses)" if len(wrong) > 1 else ""
        raise FoveateError(f"methods: {wrong[0]}{more}; leave it out, or --methods all takes those that run")
    for (_, recipe), reason in refused.items():
        left_out(f"left out: {recipe}: {reason}")
    return [cell for cell in cells if cell.recipe not in reasons]
