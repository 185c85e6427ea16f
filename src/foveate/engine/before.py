"""What of a recipe runs while samples are read to quantize weights: all that acts before the language model."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from foveate.core.errors import FoveateError
from foveate.core.exits import Exits
from foveate.core.leaning import Leaning
from foveate.core.method import Cache, Experts, Method, Pictures, Routing, Tokens
from foveate.core.recipe import Recipe
from foveate.core.reuse import Reuse
from foveate.core.traits import Traits
from foveate.core.weights import Weights
from foveate.engine.check import BEFORE_LAYERS
from foveate.engine.session import Session

Attaching = Callable[[], AbstractContextManager[Session]]
"""Puts the methods in front to work until it is left."""


def parted(recipe: Recipe) -> tuple[Weights, Recipe]:
    """The method of a recipe that replaces weights, and all others.

    Raises:
        FoveateError: if there is none or several, or it leaves the model as it is.
    """
    found = [method for method in recipe.methods if isinstance(method, Weights)]
    others = tuple(method for method in recipe.methods if not isinstance(method, Weights))
    if not found and len(others) == 1:
        raise FoveateError(f"{others[0].name}: replaces no weights; it runs on quantized and on plain models as it is")
    if len(found) != 1:
        raise FoveateError(
            f"quantize {str(recipe)!r}: must have one method that replaces weights, such as 'rtn(bits=4)'; has {len(found)}"
        )
    if found[0].plain:
        raise FoveateError(f"{found[0].name}: bits=16: leaves the model as it is; choose 8 bits or less")
    return found[0], Recipe(others)


def in_front(method: Weights, others: Recipe, traits: Traits) -> tuple[Recipe, list[str]]:
    """What of ``others`` runs while samples are read for ``method``, and a line that names the rest.

    Methods on pictures run where pictures become inputs of the model (`pictures`), and are in neither.
    """
    fits = [one for one in others.methods if method.part == "decoder" and _acts_before(one, traits)]
    rest = [one.name for one in others.methods if one not in fits and not isinstance(one, Pictures)]
    if not method.streams or not rest:
        return Recipe(tuple(fits)), []
    where = "act inside the language model" if method.part == "decoder" else "act behind what is quantized, or inside it"
    return Recipe(tuple(fits)), [f"samples were read without {', '.join(rest)}: methods that {where} are left out"]


def pictures(others: Recipe) -> Recipe:
    """What of ``others`` acts on pictures before they become inputs."""
    return Recipe(tuple(one for one in others.methods if isinstance(one, Pictures)))


def _acts_before(method: Method, traits: Traits) -> bool:
    """Whether all that a method does is done before the first decoder layer."""
    if isinstance(method, Pictures | Cache | Experts | Exits | Leaning | Routing):
        return False
    if not isinstance(method, Tokens):
        return isinstance(method, Reuse)
    return all(site.kind in BEFORE_LAYERS for site in method.fitted(traits).sites(traits))
