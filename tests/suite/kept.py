"""What a forward under a recipe kept of a sample, so that two ways of showing it can be compared."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.core.roles import VISUAL
from foveate.engine.session import Session


@dataclass
class Kept:
    """Numbers of tokens, counted from the prompt's first one.

    Attributes:
        alive: visual tokens at each decoder layer, and behind the last.
        active: tokens that run through each layer, None where all do.
        held: tokens that each head of each layer's cache goes on to read, once where all read the same; layers that hold the
            last columns are left out.
    """

    alive: list[list[int]]
    active: list[list[int] | None]
    held: list[list[list[int]]]


def kept(session: Session, cache: Any, sample: int, prompt: range) -> Kept:
    """What the last forward kept of the columns ``prompt`` of a sample."""

    def numbers(columns: Tensor) -> list[int]:
        return sorted(column - prompt.start for column in columns.tolist() if column in prompt)

    shown = bool(session.trace.log) and bool(session.trace.log[-1][0].items[sample])
    layouts, routes = (session.trace.log[-1], session.trace.routes[-1]) if shown else ([], [])
    ledgers = [layer.ledger for layer in cache.layers if getattr(layer, "sliding_window", 0) is None]
    return Kept(
        alive=[numbers(layout.origin[sample, layout.rows(*VISUAL)[sample]]) for layout in layouts],
        active=[
            None if plan is None else _unless_all(numbers, layout.origin[sample], layout.valid[sample], plan.active[sample])
            for layout, plan in zip(layouts, routes)
        ],
        held=[
            _unless_equal([numbers(head) for head in ledger.tokens(sample + 1, torch.device("cpu"))[sample]])
            for ledger in ledgers
        ],
    )


def _unless_all(numbers: Callable[[Tensor], list[int]], origin: Tensor, valid: Tensor, active: Tensor) -> list[int] | None:
    chosen = numbers(origin[valid & active])
    return None if chosen == numbers(origin[valid]) else chosen


def _unless_equal(heads: list[list[int]]) -> list[list[int]]:
    return heads[:1] if all(head == heads[0] for head in heads) else heads
