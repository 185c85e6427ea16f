"""GPTQ: one column of a weight is rounded after another, and those still to come make up for its error.

Paper: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", arXiv 2210.17323. Steps are found
as in GPTAQ's code, by a search among shares of each row's range, unless `clip` is off. Linears of one input share its second
moments, which are those of rows as blocks that are quantized already make them. A baseline of VLM-PTQ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from foveate.core.parameters import In
from foveate.core.registry import register
from foveate.core.weights import Block, Replaced, Stream, Weights
from foveate.ops.grid import Grid, tokens
from foveate.ops.solve import Factored, Moments

POWER = 2.4
"""Of an error in the search for steps, in GPTAQ's code."""

Solver = Callable[[Tensor], tuple[Tensor, Grid]]
"""Integers ``[out, in]`` and their grid for a weight."""


@register
@dataclass(frozen=True)
class GPTQ(Weights):
    """Columns in turn, on the inputs of the quantized model."""

    name = "gptq"
    title = "GPTQ"
    group = "weights"
    paper = "arXiv 2210.17323"
    helps = "For weights of 4 or 3 bits without groups, with some dozens of samples; each column makes up for the last."
    streams: ClassVar[tuple[Stream, ...]] = ("reached",)
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16}

    clip: bool = True
    """Whether the range of each row or group is cut to where the error of its weights is least."""
    damping: Annotated[float, In(0, 1)] = 0.01
    """Share of the mean second moment that is added to each input's; ten times more wherever that is not enough."""
    ordered: bool = False
    """Whether the inputs with the largest second moments come first; steps of groups then are those of the plain weight."""

    def moments(self, block: Block, names: Sequence[str]) -> Moments:
        """Second moments of what reaches these linears and, if the method looks there, of how far that is from the exact."""
        first, paired = block.weight(names[0]), "exact" in self.streams
        found = Moments(first.shape[1], paired, first.device)
        exact = block.exact(names[0]) if paired else repeat(None)
        for rows, ahead in zip(block.reached(names[0]), exact):
            x = tokens(rows.x.float(), self.activations)
            found.add(x, None if ahead is None else ahead.x, samples=int(rows.sample.amax()) + 1)
        return found

    def factored(self, moments: Moments) -> Factored:
        """What the linears with these moments are rounded by."""
        return Factored.of(moments.own, damping=self.damping, ordered=self.ordered)

    def grid(self, weight: Tensor, stored: torch.dtype) -> Grid:
        """Of some columns of a weight."""
        if not self.clip:
            return Grid.of(weight.float(), self.bits, self.group_size, self.symmetric, stored=stored)
        return Grid.searched(weight.float(), self.bits, self.group_size, self.symmetric, power=POWER, stored=stored)

    def quantize(self, block: Block) -> None:
        """Place one group of linears after the other, each on what those before it make."""
        for names in block.groups:
            moments = self.moments(block, names)
            factored = self.factored(moments)
            if factored.damping > self.damping:
                block.say(f"block {block.number}: damping={factored.damping:g} was needed for {', '.join(names)}")
            solve = self.solver(block, names, moments, factored)
            for name in names:
                integers, grid = solve(block.weight(name))
                block.place(name, Replaced(grid, integers, activations=self.activations))

    def solver(self, block: Block, names: Sequence[str], moments: Moments, factored: Factored) -> Solver:
        """What finds integers and grids of these linears."""
        return lambda weight: factored.solve(weight, lambda part, columns: self.grid(part, block.dtype), self.group_size)
