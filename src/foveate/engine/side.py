"""Side data: what the caller hands over beside the pictures, for methods that read more than pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from foveate.core.errors import FoveateError
from foveate.core.signal import Side, on
from foveate.engine.program import Program
from foveate.models.anatomy import Picture

Handed = Mapping[str, Mapping[str, Any]]
"""By kind of picture (``"image"``, ``"video"``) and name."""


class ByItem:
    """Side data of one name, as methods read it (a `foveate.core.signal.ByItem`)."""

    def __init__(self, values: Sequence[Any], place: Callable[[int, int], int]) -> None:
        self._values, self._place = values, place

    def of(self, items: Sequence[tuple[int, int]]) -> list[Any]:
        """The value of the picture that each item, given as (sample, number), shows."""
        return [self._values[self._place(sample, number)] for sample, number in items]


def handed(program: Program, kinds: Mapping[str, Mapping[str, Any]]) -> Handed:
    """The side data of ``images`` and ``videos``, by name.

    Raises:
        FoveateError: for other kinds, and for names that a recipe which reads side data does not read: they are misspelt, or
            meant for another one.
    """
    unknown = sorted(kinds.keys() - {"images", "videos"})
    if unknown:
        raise FoveateError(f"{unknown[0]}: nobody hands over side data of these; write images={{...}} or videos={{...}}")
    read = sorted({signal.name for signal in program.side})
    for kind, named in kinds.items():
        for name in named:
            if read and name not in read:
                raise FoveateError(f"{kind}: {program.recipe} reads no side data {name!r}; it reads {', '.join(read)}")
    return {kind: kinds.get(f"{kind}s", {}) for kind in ("image", "video")}


def by_view(program: Program, kind: str, named: Mapping[str, Any], pictures: Sequence[Picture]) -> dict[Side, list[Any]]:
    """What the recipe's methods read of the side data of ``pictures`` (or videos), a value for each of their views.

    Raises:
        FoveateError: if there are not as many values as pictures, or a method lacks one that it needs.
    """
    found: dict[Side, list[Any]] = {}
    for signal in program.side:
        value, count = named.get(signal.name), len(pictures)
        each = list(value) if isinstance(value, list | tuple) else [value] * count
        if len(each) != count:
            raise FoveateError(
                f"{kind}s: side data {signal.name!r} has {len(each)} values for {count} {kind}s; give one for each, or a "
                "single value for all"
            )
        if signal.needed and any(one is None for one in each):
            reader = next(method.name for method, signals in program.reads.items() if signal in signals)
            raise FoveateError(
                f"{reader}: needs side data {signal.name!r} of every {kind}; call the model inside of `with "
                f"session.side({kind}s={{{signal.name!r}: [...]}})`"
            )
        home = [on(_tensor(one), program.home) for one in each]
        found[signal] = [one for one, picture in zip(home, pictures) for _ in picture.views]
    return found


def _tensor(value: Any) -> Any:
    """Arrays as tensors; all else as it is."""
    return torch.from_numpy(value) if type(value).__module__ == "numpy" and hasattr(value, "dtype") else value
