"""Arguments of the model's own functions, however they were given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All of a call's arguments by name, those that were given by their place too."""
    return {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}


def numbers(asked: bool | int | Sequence[int], count: int) -> frozenset[int]:
    """Which of ``count`` hidden states are asked for: all, none, or some by number (negative: from the end)."""
    every = range(count)
    if isinstance(asked, bool):
        return frozenset(every if asked else ())
    chosen = [asked] if isinstance(asked, int) else asked
    return frozenset(every[number] for number in chosen if -count <= number < count)
