"""What an operator allows, and what one request asks for.

Read by the door (which knows no picture yet), by vLLM's processor (which knows the grid) and by its model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe

FULL: Final = "full"
Keep = int | float | Literal["full"]
"""Tokens of each picture: a count, a share of its own, or all of them."""


@dataclass(frozen=True)
class Settings:
    """A server's recipe and the bounds of what clients may ask for.

    Attributes:
        recipe: as a string.
        min_keep, max_keep: the fewest and the most tokens of a picture that a request may ask for; None = no bound.
    """

    recipe: str
    min_keep: int | float | None = None
    max_keep: int | float | None = None

    def __post_init__(self) -> None:
        Recipe.of(self.recipe)
        for name in ("min_keep", "max_keep"):
            if getattr(self, name) is not None:
                checked(name, getattr(self, name))
        least, most = self.min_keep, self.max_keep
        if least is not None and most is not None and type(least) is type(most) and least > most:
            raise FoveateError(f"min_keep={least!r}: must not be more than max_keep={most!r}")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Settings:
        """From ``--hf-overrides '{"foveate": {...}}'``."""
        unknown = sorted(given.keys() - cls.__dataclass_fields__.keys())
        if unknown or "recipe" not in given:
            wrong = f"{unknown[0]!r} is no setting" if unknown else "no recipe"
            raise FoveateError(f"foveate={dict(given)!r}: {wrong}; known are {', '.join(cls.__dataclass_fields__)}")
        return cls(**given)

    def bounds(self, full: int) -> tuple[int, int]:
        """The fewest and the most tokens of a picture that has ``full`` of them."""
        fewest = 1 if self.min_keep is None else resolved(self.min_keep, full)
        return fewest, full if self.max_keep is None else resolved(self.max_keep, full)

    def resolve(self, keep: Keep, full: int) -> int:
        """Tokens that stay of a picture of ``full``; refused outside of the bounds."""
        wanted, (fewest, most) = resolved(keep, full), self.bounds(full)
        if not fewest <= wanted <= most:
            raise FoveateError(
                f"keep={keep!r}: {wanted} of this picture's {full} tokens, but this server allows {fewest} to {most}"
            )
        return wanted


def checked(name: str, keep: object) -> Keep:
    """A keep of the right form, or an error that names it."""
    if isinstance(keep, str) and keep == FULL:
        return FULL
    try:
        if isinstance(keep, int | float):
            return Budget(keep).keep
    except FoveateError:
        pass
    raise FoveateError(f"{name}={keep!r}: must be a count, a share in (0, 1] or {FULL!r}")


def resolved(keep: Keep, full: int) -> int:
    """How many of ``full`` tokens that is."""
    return full if isinstance(keep, str) else Budget(keep).of(full)
