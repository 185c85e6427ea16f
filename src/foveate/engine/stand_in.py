"""Functions that take the place of a module's own, and give it back."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class StandIn(functools.partial[Any]):
    """``function(*given, original, *args, **kwargs)``, in the place of ``original``. A copy of its module gets that back."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.args[-1], memo)


class Attached(functools.partial[Any]):
    """A function that a session lays on a module or hooks into it. A copy of the module gets one that does nothing."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return nothing


def nothing(*args: Any, **kwargs: Any) -> None:
    """Leave things alone."""


def _straight(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)


def compiled(module: nn.Module) -> bool:
    """Whether ``torch.compile`` was told to compile this very module, or its forward."""
    return module._compiled_call_impl is not None or hasattr(module.__dict__.get("forward"), "_torchdynamo_orig_callable")


def stand_in(module: nn.Module, name: str, function: Callable[..., Any], *given: Any) -> Callable[[], None]:
    """Let ``function(*given, original, *args, **kwargs)`` take the place of ``module.name``; returns what undoes it.

    ``original`` is what was called by that name: the class's, or what somebody else (accelerate, a user) had put there,
    which comes back. What others put around it meanwhile stays.
    """
    own, original = module.__dict__.get(name), getattr(module, name)
    standing = functools.update_wrapper(StandIn(function, *given, original), original)
    module.__dict__[name] = standing

    def undo() -> None:
        # Whoever has wrapped it meanwhile goes on calling it.
        standing.__setstate__((_through, (original,), {}, standing.__dict__))
        if module.__dict__.get(name) is not standing:
            # Somebody holds on to it, in a wrapper of their own: from now on it only calls what was there before.
            standing.__setstate__((_straight, (original,), {}, standing.__dict__))
        elif own is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = own

    return undo


def _through(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs)
