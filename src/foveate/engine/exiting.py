"""Rows that leave before the last decoder layer (`foveate.core.exits.Exits`), in one forward."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.exits import Exits
from foveate.core.method import Plan
from foveate.core.roles import Role, last_of
from foveate.core.signal import Seen
from foveate.core.state import State
from foveate.engine.cache import FoveateLayer
from foveate.engine.clock import Clock
from foveate.engine.program import Program
from foveate.engine.rows import Rows


class Exiting:
    """What has left in one forward.

    Attributes:
        acts: whether anything may leave.
        over: whether nothing runs on: from now on layers only get keys and values.
        left: whether anything has left.
        ran, possible: layers that the rows that predict ran through, and could have, all together.
    """

    def __init__(self, program: Program, rows: Rows, clock: Clock, *, turn: bool) -> None:
        self._program, self._rows, self._clock = program, rows, clock
        self.acts = program.exits is not None and (turn or rows.given == 1)
        self.over = self.left = False
        self.ran = self.possible = 0
        self._plan: Plan | None = None
        self._index: Tensor | None = None

    @property
    def method(self) -> Exits:
        """Who lets them."""
        assert self._program.exits is not None
        return self._program.exits

    def plan(self, layer: int, x: Tensor, read: Callable[[Any], Seen], state: State) -> Plan | None:
        """Which rows of ``x`` ``[B, N, D]`` run through a decoder layer, now that some have left; None if none has."""
        if layer in self._program.exit_layers and not self.over:
            with self._timed():
                self._ask(layer, x, read(self.method), state)
        return self._plan

    def write(self, layer: int, x: Tensor, cache: FoveateLayer, given: tuple[Tensor, Tensor]) -> tuple[Any, Any]:
        """Keys and values of all rows, none of which runs through the layer; ``given`` are the model's rotary tables.

        Returns:
            Rows that are there and rows that are active, of each sample of a prompt.
        """
        rows, old = self._rows, cache.ledger
        new = rows.extended(old)
        cos, sin = rows.rope(layer, x, given, old)
        with rows.said():
            cache.update(*rows.anatomy.keys_values(layer, x, (cos.to(x.device), sin.to(x.device))))
        cache.announce(new, 0)
        return (rows.layout.live, (0,) * rows.batch) if rows.given > 1 else ((), ())

    def close(self, x: Tensor, read: Callable[[Any], Seen], state: State) -> Tensor:
        """What leaves the last layer ``[B, N, D]``, rows that left before it among the others."""
        if self._index is None:
            return x
        index, asked = self._index.to(x.device), self._asked.to(x.device)
        stayed = asked & ~self._left.to(x.device)
        self.method.ended(_at(x, index), stayed, asked, read(self.method), state)
        if not self.left:
            return x
        place = index.masked_fill(stayed | ~asked, x.shape[1])  # a spare row, for those that stayed
        out = torch.cat([x, x[:, :1]], dim=1)
        return out.scatter(1, place[..., None].expand_as(self._out), self._out.to(x))[:, : x.shape[1]]

    # Inside.

    def _timed(self) -> AbstractContextManager[None]:
        # Steps of decoding are too short to be timed in parts.
        return nullcontext() if self._rows.given == 1 else self._clock.lap("method")

    def _ask(self, layer: int, x: Tensor, seen: Seen, state: State) -> None:
        if self._index is None:
            self._begin(x)
        assert self._index is not None
        index, self._left = self._index.to(x.device), self._left.to(x.device)
        asked = self._asked.to(x.device) & ~self._left
        leaving = self.method.leave(layer, _at(x, index), asked, seen, state)
        new = leaving.leaves & asked
        rows = leaving.rows.to(x.dtype)
        self._out = rows if not self.left else torch.where(new[..., None], rows, self._out.to(x.device))
        self._left = self._left | new
        before, told = self._told, self._left.tolist()  # the one wait
        count = sum(map(sum, told)) - sum(map(sum, before))
        if not count:
            return
        self._told, self.left = told, True
        self.ran -= count * (len(self._program.anatomy.layers) - layer)
        self.over = sum(map(sum, told)) == self._count
        self._plan = self._made(x, told)

    def _begin(self, x: Tensor) -> None:
        """Which rows are asked: those that predict, from the first exit on, behind which no row is dropped."""
        rows, batch = self._rows, x.shape[0]
        if rows.given == 1:
            self._index = torch.zeros(batch, 1, dtype=torch.long, device=x.device)
            answers: tuple[int, ...] = ()
        else:
            layout = rows.layout
            answers = () if self._program.traits.mask_free else layout.answers
            last = torch.zeros_like(layout.valid).scatter(1, layout.last, True)
            asking = last | (layout.role == Role.ANSWER) if any(answers) else last
            self._index = last_of(asking, 1 + max(answers, default=0))
        self._asked = self._index >= 0
        self._left = torch.zeros_like(self._asked)
        self._count = batch + sum(answers)
        self._answers = answers or (0,) * batch
        self._told = [[False] * self._index.shape[1]] * batch
        self.ran = self.possible = self._count * len(self._program.anatomy.layers)

    def _made(self, x: Tensor, told: list[list[bool]]) -> Plan:
        """The plan of the rows that have not left, ``told`` of those that are asked."""
        assert self._index is not None
        batch, width = self._index.shape
        if self.over:
            return Plan(torch.zeros(x.shape[:2], dtype=torch.bool, device=x.device), True, (0,) * batch, (0,) * batch)
        layout = self._rows.layout
        decides = [width - 1 - answers for answers in self._answers]  # the prompt's last row, before those of its answer
        prompt = [told[sample][place] for sample, place in enumerate(decides)]
        every = layout.answers or (0,) * batch
        counts = tuple(
            (0 if gone else live - rows) + rows - sum(told[sample][decides[sample] + 1 :])
            for sample, (gone, live, rows) in enumerate(zip(prompt, layout.live, every))
        )
        visual = tuple(0 if gone else count for gone, count in zip(prompt, layout.visual))
        out = upload(prompt, x.device)[:, None] & layout.prompt
        spare = torch.nn.functional.pad(out, (0, 1))
        place = self._index.to(x.device).masked_fill(~self._asked.to(x.device), x.shape[1])
        gone = spare.scatter(1, place, self._left)[:, : x.shape[1]]
        return Plan(layout.valid & ~gone, frozen=True, counts=counts, visual=visual)


def _at(x: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``[B, Q]`` (-1: any) of ``x`` ``[B, N, D]``."""
    return x if x.shape[1] == 1 else x.gather(1, index.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
