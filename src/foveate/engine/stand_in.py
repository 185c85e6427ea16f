"""Functions that take the place of a module's own, and give it back."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import nn


def stand_in(module: nn.Module, name: str, function: Callable[..., Any], *given: Any) -> Callable[[], None]:
    """Let ``function(*given, original, *args, **kwargs)`` take the place of ``module.name``; returns what undoes it.

    ``original`` is what was called by that name: the class's, or what somebody else (accelerate, a user) had put there,
    which comes back. What others put around it meanwhile stays.
    """
    own, original = module.__dict__.get(name), getattr(module, name)
    # Not a closure: copying the module then copies the session, which refuses, instead of sharing it in silence.
    standing = functools.update_wrapper(functools.partial(function, *given, original), original)
    module.__dict__[name] = standing

    def undo() -> None:
        # Whoever has wrapped it meanwhile goes on calling it.
        standing.__setstate__((_through, (original,), {}, standing.__dict__))
        if module.__dict__.get(name) is not standing:
            return
        if own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own

    return undo


def _through(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
