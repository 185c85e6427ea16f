"""Which methods there are: the package's own and those of others, all by the entry-point group ``foveate.methods``."""

from __future__ import annotations

import difflib
import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TypeVar

from foveate.core.errors import FoveateError
from foveate.core.method import Method

ENTRY_POINTS = "foveate.methods"
_LOG = logging.getLogger(__name__)
_METHODS: dict[str, type[Method]] = {}
M = TypeVar("M", bound=type[Method])


def register(method: M) -> M:
    """Class decorator that makes a method known under its ``name``."""
    known = _METHODS.get(method.name)
    if known is not None and (known.__module__, known.__qualname__) != (method.__module__, method.__qualname__):
        raise FoveateError(f"method name {method.name!r}: taken by {known.__module__}.{known.__qualname__}")
    _METHODS[method.name] = method
    return method


def methods() -> dict[str, type[Method]]:
    """Every method by name, sorted."""
    _load()
    return dict(sorted(_METHODS.items()))


def get(name: str) -> type[Method]:
    """The method called ``name``."""
    known = methods()
    if name in known:
        return known[name]
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
    raise FoveateError(f"unknown method {name!r}: {hint}")


@cache
def _load() -> None:
    points = entry_points(group=ENTRY_POINTS)
    own = [point for point in points if _is_own(point)]
    if not own:
        raise FoveateError(
            f"entry points {ENTRY_POINTS!r}: the package's own are missing; install it again (pip install -e .)"
        )
    # First, so that it is others who find a name taken; and without them there is nothing to go on with.
    for point in own:
        point.load()
    for point in points:
        if point in own:
            continue
        try:
            point.load()
        # A package may die of anything; the methods of the others are not to blame.
        except Exception as error:
            package, reason = point.dist.name if point.dist else point.module, " ".join(str(error).split())
            _LOG.warning(
                f"package {package!r}: its methods are missing, {point.value!r} cannot be loaded "
                f"({type(error).__name__}: {reason}); update or uninstall it"
            )


def _is_own(point: EntryPoint) -> bool:
    return point.module.partition(".")[0] == __name__.partition(".")[0]
