"""What the bench measures: every task under every method at every budget, each combination a cell."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from foveate.core import registry
from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.recipe import NONE, Recipe, lies_elsewhere
from foveate.core.text import split_outside_brackets

SMALLER = ("downsample", "pool")
"""Plain image operations: the picture made smaller, and, where a model cannot see that, its tokens averaged."""
RANDOM = ("random", "random_kv")
"""What draws what it keeps: a method compares with the first of them that was measured, tokens or entries of the cache."""
PICTURE_POINTS = (NONE, "random", "uniform", *SMALLER)
"""Always measured where the model takes it: what is there to lose, and what any method has to beat."""
TEXT_POINTS = (NONE, "random_kv")
"""The same for models that read text alone."""
REFERENCE_POINTS = (*PICTURE_POINTS, "random_kv")
"""What is no method to be judged, wherever it was measured."""

ALL = "all"
"""Stands for every method that the model takes."""

Keep = int | float | None
"""A count, a ratio, or None for a method that takes no budget from the bench."""


Key = tuple[str, str, str]
"""Task, method and budget of a cell; the budget as text, because 1 (one token) and 1.0 (all of them) are equal numbers."""


@dataclass(frozen=True)
class Cell:
    """One task under one method at one budget. ``method`` is as the user wrote it, ``recipe`` has the budget filled in."""

    task: str
    method: str
    keep: Keep
    recipe: Recipe

    @property
    def key(self) -> Key:
        """What tells the cells of a folder apart."""
        return self.task, self.method, keep_text(self.keep)

    def __str__(self) -> str:
        return f"{self.task} · {self.method} {keep_text(self.keep)}".strip()


@dataclass(frozen=True)
class Contender:
    """A recipe whose methods named in ``open`` (its places) take their budget (`Method.budgeted`) from the bench."""

    text: str
    recipe: Recipe
    open: tuple[int, ...]

    @classmethod
    def parse(cls, text: str) -> Contender:
        """From a method's name or a recipe; a budget that is written out stays as it is, and so does all of a file's."""
        recipe = Recipe.of(text)
        if lies_elsewhere(text):
            return cls(str(recipe), recipe, ())
        terms = split_outside_brackets(text, "+")
        takes = [
            method.takes_budget() and not re.search(rf"\b{method.budgeted}\s*=", term)
            for method, term in zip(recipe.methods, terms)
        ]
        return cls(text, recipe, tuple(place for place, taken in enumerate(takes) if taken))

    def at(self, keep: Keep) -> Recipe:
        """The recipe with a budget filled in."""
        methods = list(self.recipe.methods)
        for place in self.open:
            methods[place] = replace(methods[place], **{methods[place].budgeted: keep})
        return Recipe(tuple(methods))

    def budgets(self, keeps: Sequence[int | float]) -> tuple[Keep, ...]:
        """The budgets at which to measure: all, or the one None where nothing is open."""
        return tuple(keeps) if self.open else (None,)


def spread_out(methods: Sequence[str], keeps: Sequence[int | float]) -> tuple[list[str], dict[str, str]]:
    """The methods with `ALL` replaced by every one there is, and, of these, why some cannot be had at these budgets."""
    named = [method for method in methods if method != ALL]
    if len(named) == len(methods):
        return named, {}
    found, refused = list(named), {}
    for name in sorted(registry.methods()):
        try:
            plan([""], [name], keeps)
        except FoveateError as error:
            refused[name] = str(error)
        else:
            found.append(name)
    return found, refused


def plan(
    tasks: Sequence[str], methods: Sequence[str], keeps: Sequence[int | float], points: Sequence[str] = PICTURE_POINTS
) -> list[Cell]:
    """The cells in the order in which they are measured: task by task, the reference ``points`` first."""
    contenders = [Contender.parse(text) for text in dict.fromkeys((*points, *methods))]
    return [
        Cell(task, contender.text, keep, contender.at(keep))
        for task in dict.fromkeys(tasks)
        for contender in contenders
        for keep in contender.budgets(keeps)
    ]


def parse_methods(text: str) -> list[str]:
    """Names and recipes from a list separated by commas (those inside brackets belong to a recipe), `ALL` among them."""
    methods = [part.strip() for part in split_outside_brackets(text, ",")]
    if not any(methods):
        raise FoveateError(f"methods={text!r}: names none; must be names or recipes, such as fastv,hiprune, or all")
    return [method for method in methods if method]


def parse_keeps(text: str) -> list[int | float]:
    """Budgets from a list such as ``0.33,0.22,64``: ratios have a point, counts have none."""
    return list({keep_text(keep): keep for keep in map(_keep, text.split(","))}.values())


def keep_text(keep: Keep) -> str:
    """A budget as text, nothing for None."""
    return "" if keep is None else str(keep)


def _keep(text: str) -> int | float:
    text = text.strip()
    try:
        keep = int(text) if re.fullmatch(r"[+-]?\d+", text) else float(text)
    except ValueError as error:
        raise FoveateError(f"keep={text!r}: must be ratios in (0, 1] or counts, such as 0.33,0.22,64") from error
    Budget(keep)
    return keep
