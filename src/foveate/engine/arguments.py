"""Arguments of the model's own functions, however they were given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All of a call's arguments by name, those that were given by their place too."""
    return {**dict(zip(inspect.signature(function).parameters, args)), **kwargs}
