"""Reductions, prompts and methods, drawn at random.

Weights are small powers of two and values small integers, so that float32 sums are exact in any order.
"""

from __future__ import annotations

import types
import typing
from dataclasses import fields
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Method
from foveate.core.reduction import Reduction
from foveate.core.roles import Item

WEIGHTS = (0.25, 0.5, 1.0, 2.0)


@st.composite
def masks(draw: st.DrawFn) -> Tensor:
    """``[B, N]`` which rows of a sequence are alive: at least one of each sample."""
    rows = draw(st.integers(1, 6))
    sample = st.lists(st.booleans(), min_size=rows, max_size=rows).filter(any)
    return torch.tensor(draw(st.lists(sample, min_size=1, max_size=3)))


@st.composite
def subsets(draw: st.DrawFn, alive: Tensor) -> Tensor:
    """``[B, N]`` some of the rows that are alive, at least one of each sample."""
    chosen = torch.zeros_like(alive)
    for sample, mask in enumerate(alive):
        rows = mask.nonzero().flatten().tolist()
        chosen[sample, draw(st.lists(st.sampled_from(rows), min_size=1, unique=True))] = True
    return chosen


@st.composite
def gathers(draw: st.DrawFn, alive: Tensor) -> Reduction:
    """Rows in any order, without repetition."""
    rows = [mask.nonzero().flatten().tolist() for mask in draw(subsets(alive))]
    return Reduction.gather(_padded([draw(st.permutations(sample)) for sample in rows]), alive.shape[1])


@st.composite
def merges(draw: st.DrawFn, alive: Tensor) -> Reduction:
    """Every row alive goes to one output row or to none; the anchors go to their own."""
    anchors = [mask.nonzero().flatten().tolist() for mask in draw(subsets(alive))]
    anchor = _padded(anchors)
    assignment = torch.full(alive.shape, -1)
    for sample, mask in enumerate(alive):
        outputs = anchor[sample].ge(0).nonzero().flatten().tolist()
        for row in mask.nonzero().flatten().tolist():
            assignment[sample, row] = draw(st.sampled_from([-1, *outputs]))
        assignment[sample, anchor[sample, outputs]] = torch.tensor(outputs)
    weight = st.lists(st.sampled_from(WEIGHTS), min_size=alive.numel(), max_size=alive.numel())
    return Reduction.merging(assignment, torch.tensor(draw(weight)).reshape(alive.shape), anchor)


@st.composite
def mixtures(draw: st.DrawFn, alive: Tensor) -> Reduction:
    """Any rows feed any rows."""
    anchor = _padded([mask.nonzero().flatten().tolist() for mask in draw(subsets(alive))])
    shape = (*anchor.shape, alive.shape[1])
    count = torch.Size(shape).numel()
    weight = draw(st.lists(st.sampled_from((0.0, *WEIGHTS)), min_size=count, max_size=count))
    matrix = torch.tensor(weight).reshape(shape)
    return Reduction.dense(matrix * (anchor >= 0)[..., None] * alive[:, None], anchor)


def reductions(alive: Tensor) -> st.SearchStrategy[Reduction]:
    """A reduction of any kind of a sequence whose rows ``alive`` ``[B, N]`` are no padding."""
    return st.one_of(gathers(alive), merges(alive), mixtures(alive))


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...], alive: Tensor) -> Tensor:
    """Hidden states; padding rows are zero, as reductions leave them."""
    count = torch.Size(shape).numel()
    drawn = draw(st.lists(st.integers(-8, 8), min_size=count, max_size=count))
    return torch.tensor(drawn, dtype=torch.float32).reshape(shape) * alive.reshape(*alive.shape, *[1] * (len(shape) - 2))


@st.composite
def prompts(draw: st.DrawFn, rotary_rows: int = 1, text_last: bool = False) -> Layout:
    """Left-padded prompts of text and images; ``text_last``: none ends in an image."""
    segment = st.one_of(st.integers(1, 3), st.tuples(st.integers(1, 3), st.integers(1, 3)))
    samples = draw(st.lists(st.lists(segment, min_size=1, max_size=4), min_size=1, max_size=3))
    visual: list[list[bool]] = []
    items: list[list[Item]] = []
    source = 0
    for segments in samples:
        if text_last:
            segments.append(1)
        visual.append([])
        items.append([])
        for part in segments:
            if isinstance(part, int):
                visual[-1] += [False] * part
            else:
                items[-1].append(Item(*part, source))
                visual[-1] += [True] * items[-1][-1].count
                source += 1
    width = max(map(len, visual))
    placeholder = torch.tensor([[False] * (width - len(row)) + row for row in visual])
    valid = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in visual])
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    return Layout.build(placeholder, valid, positions.expand(rotary_rows, -1, -1), items)


@st.composite
def methods(draw: st.DrawFn) -> Method:
    """Any registered method with any parameters that it accepts."""
    kind = draw(st.sampled_from(sorted(registry.methods())).map(registry.get))
    types_of = typing.get_type_hints(kind)
    chosen = draw(st.sets(st.sampled_from([field.name for field in fields(kind)])))
    try:
        return kind(**{name: draw(_of_type(types_of[name])) for name in sorted(chosen)})
    except FoveateError:
        assume(False)
        raise


def _of_type(kind: Any) -> st.SearchStrategy[Any]:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return st.sampled_from(arguments)
    if origin in (typing.Union, types.UnionType):
        return st.one_of(*map(_of_type, arguments))
    if origin is tuple:
        return st.lists(_of_type(arguments[0]), max_size=4).map(tuple)
    numbers = {int: st.integers(1, 999), float: st.floats(0, 1, exclude_min=True)}
    return numbers[kind] if kind in numbers else st.from_type(kind)


def _padded(rows: list[list[int]]) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[-1] * (width - len(row)) + row for row in rows])
