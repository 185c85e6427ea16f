"""Tensors among what operators take and return, which is in tuples, lists and dictionaries alone.

A dispatch mode looks at each operator, and torch's pytrees took most of its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor


def tensors(given: Any) -> Iterator[Tensor]:
    """All of them, in order."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, tuple | list):
        for each in given:
            yield from tensors(each)
    elif isinstance(given, dict):
        yield from tensors([*given.values()])


def mapped(kind: type, change: Callable[[Any], Any], given: Any) -> Any:
    """The same with what is of a kind changed, as `tree_map_only` does."""
    if isinstance(given, kind):
        return change(given)
    if isinstance(given, tuple | list):
        return type(given)([mapped(kind, change, each) for each in given])
    return {name: mapped(kind, change, each) for name, each in given.items()} if isinstance(given, dict) else given
