"""The mark of methods whose papers train the model with them, wherever they stand beside others."""

from __future__ import annotations

from collections.abc import Iterable

from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

NEEDS_TRAINING = "needs training"
MARK = "†"


def needs_training(recipe: str) -> bool:
    """Whether a method of the recipe is one that its paper trains the model with; what is not known is not."""
    try:
        return any(method.trained for method in Recipe.parse(recipe).methods)
    except FoveateError:  # of a package that is no longer there
        return False


def mark(recipe: str) -> str:
    """What is to stand behind the recipe: the mark if it needs training, otherwise nothing."""
    return f" {MARK}" if needs_training(recipe) else ""


def footnote(recipes: Iterable[str]) -> str:
    """What the mark means; nothing where no recipe bears it."""
    if not any(map(needs_training, recipes)):
        return ""
    return f"{MARK} {NEEDS_TRAINING}: its paper trains the model with it"
