"""What values a method's parameters may have, read from the annotations of its fields.

``bool``, ``int``, ``float``, literals, tuples, unions and None are taken at their word; ``Annotated`` narrows them:

>>> str(rule(Annotated[float, In(0, 1)] | None))
'a number, in [0, 1], or None'
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from itertools import pairwise
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


class Constraint(ABC):
    """Narrows the type that it annotates, and is asked about values of that type only."""

    @abstractmethod
    def fits(self, value: Any) -> bool:
        """Whether a value is right."""

    @abstractmethod
    def words(self, kind: str) -> str:
        """What would be right, to stand behind "must be"; ``kind`` says so of the type alone."""


@dataclass(frozen=True)
class In(Constraint):
    """Numbers from ``low`` to ``high``, both included."""

    low: float
    high: float

    def fits(self, value: Any) -> bool:
        """Nan is in no range."""
        return bool(self.low <= value <= self.high)

    def words(self, kind: str) -> str:
        """The range."""
        return f"{kind}, in [{self.low:g}, {self.high:g}]"


@dataclass(frozen=True)
class AtLeast(Constraint):
    """Finite numbers from ``low`` on."""

    low: float

    def fits(self, value: Any) -> bool:
        """Infinity is not asked for by any paper."""
        return math.isfinite(value) and bool(value >= self.low)

    def words(self, kind: str) -> str:
        """The lower end."""
        return f"{kind}, {self.low:g} or more"


@dataclass(frozen=True)
class Odd(Constraint):
    """Widths of windows with a middle."""

    def fits(self, value: Any) -> bool:
        """From 1 on."""
        return bool(value >= 1 and value % 2 == 1)

    def words(self, kind: str) -> str:
        """The type is an integer."""
        return "an odd integer, 1 or more"


@dataclass(frozen=True)
class Keep(Constraint):
    """A budget of tokens, as `foveate.core.budget.Budget` takes it."""

    def fits(self, value: Any) -> bool:
        """Integers are counts, all else is a ratio."""
        return bool(value >= 1 if isinstance(value, int) else 0 < value <= 1)

    def words(self, kind: str) -> str:
        """Both ways to write it."""
        return "a positive count (an integer such as 64) or a ratio in (0, 1]"


@dataclass(frozen=True)
class CountOrShare(Constraint):
    """A number of what ``of`` names, or a share of all of them; there may be none."""

    of: str

    def fits(self, value: Any) -> bool:
        """Integers are counts, all else is a share."""
        return bool(value >= 0 if isinstance(value, int) else 0 <= value <= 1)

    def words(self, kind: str) -> str:
        """Both ways to write it."""
        return f"a number of {self.of} or a share in [0, 1]"


@dataclass(frozen=True)
class Layers(Constraint):
    """Layer numbers from ``least`` on, ascending unless in ``any_order``; ``stages`` of them, if that is fixed."""

    least: int = 1
    any_order: bool = False
    stages: int | None = None

    def fits(self, value: Any) -> bool:
        """Whether the model has them is not known yet."""
        ordered = self.any_order or all(low < high for low, high in pairwise(value))
        return ordered and all(layer >= self.least for layer in value) and self.stages in (None, len(value))

    def words(self, kind: str) -> str:
        """With an example."""
        count, order = f"{self.stages} " if self.stages else "", "" if self.any_order else "ascending "
        return f"{count}{order}layer numbers, {self.least} or more, such as (4, 8)"


@dataclass(frozen=True)
class Shares(Constraint):
    """A share for each stage or layer."""

    def fits(self, value: Any) -> bool:
        """How many there must be is not known yet."""
        return all(0 <= share <= 1 for share in value)

    def words(self, kind: str) -> str:
        """With an example."""
        return "shares in [0, 1], such as (0.5, 0.25)"


@dataclass(frozen=True)
class Rule:
    """What an annotation allows: a test, and the ``words`` behind "must be"."""

    fits: Callable[[Any], bool]
    words: str

    def __str__(self) -> str:
        return self.words


@cache
def rules(kind: type) -> Mapping[str, tuple[Rule, ...]]:
    """The rules of each field of a dataclass; those of its bases hold, too, and come first."""
    hints: dict[str, list[Any]] = {field.name: [] for field in fields(kind)}
    for base in reversed(kind.__mro__):
        for name, hint in _annotations(base).items():
            # The type alone says nothing new of what a base has narrowed.
            if name in hints and hint not in hints[name] and hint not in map(_type, hints[name]):
                hints[name].append(hint)
    return {name: tuple(one for hint in found if (one := rule(hint))) for name, found in hints.items()}


def rule(hint: Any) -> Rule | None:
    """What an annotation allows; None if it says nothing that can be tested."""
    origin, inside = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _narrowed(inside[0], inside[1:])
    if origin in (Union, UnionType):
        # An integer is a number, too.
        return _one_of([rule(one) for one in inside if not (one is int and float in inside)])
    if origin is Literal:
        return Rule(lambda value: any(type(value) is type(one) and value == one for one in inside), _listed(inside))
    if origin is tuple:
        return _tuple(inside)
    return _PLAIN.get(hint) if isinstance(hint, type) else None


def _narrowed(hint: Any, constraints: tuple[Any, ...]) -> Rule | None:
    kind, narrowing = rule(hint), [one for one in constraints if isinstance(one, Constraint)]
    if kind is None:
        return None
    words = kind.words
    for one in narrowing:
        words = one.words(words)
    return Rule(lambda value: kind.fits(value) and all(one.fits(value) for one in narrowing), words)


def _one_of(found: list[Rule | None]) -> Rule | None:
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    return Rule(lambda value: any(one.fits(value) for one in known), ", or ".join(one.words for one in known))


def _tuple(inside: tuple[Any, ...]) -> Rule | None:
    found = [rule(one) for one in inside if one is not ...]
    known = [one for one in found if one is not None]
    if len(known) < len(found):
        return None
    if inside[-1] is ...:
        (each,) = known
        return Rule(lambda value: isinstance(value, tuple) and all(map(each.fits, value)), f"a tuple, each {each.words}")
    return Rule(
        lambda value: (
            isinstance(value, tuple) and len(value) == len(known) and all(one.fits(part) for one, part in zip(known, value))
        ),
        f"a tuple ({', '.join(one.words for one in known)})",
    )


def _listed(values: tuple[Any, ...]) -> str:
    *others, last = map(repr, values)
    return f"{', '.join(others)} or {last}" if others else last


def _type(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _annotations(kind: type) -> dict[str, Any]:
    try:
        return inspect.get_annotations(kind, eval_str=True)
    except NameError:
        # A class that names types for type checkers only checks its values itself.
        return {}


_PLAIN = {
    bool: Rule(lambda value: isinstance(value, bool), "true or false"),
    int: Rule(lambda value: isinstance(value, int) and not isinstance(value, bool), "an integer"),
    float: Rule(lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number"),
    str: Rule(lambda value: isinstance(value, str), "text"),
    NoneType: Rule(lambda value: value is None, "None"),
}
