"""LS-ViT: an encoder's blocks learn how their weights are rounded, by a fitted curvature of the model's answers.

Paper: "Least-Squares Hessian Based Block Reconstruction for Low-Bit Post-Training Quantization of Vision Transformers", CVPR
2026. No published code could be read. Curvature is a diagonal and a rank one, fitted to pairs of how far a block's output is
off and of the gradient there, by one pass of the whole model backward for each block. All else is FIMA-Q's published code
(QDrop with learned rounding), whose pipeline is the paper's: steps are searched, weights go up or down, steps of inputs are
learned, too.

Reconstructed: gradients are those of the divergence of the language model's answers while this block alone is rounded;
negative curvatures and pairs count as 0. Own readings: where pictures have different numbers of tokens, or nobody says which
row is whose, curvature is that of channels, and each row makes a pair; a step of learning sees one of the batches, as they
come; linears with one input share its grid, which is searched on 1024 rows. Linears of blocks are rounded, but attention's
products, patch embedding and projector are not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.parameters import AtLeast, In
from foveate.core.registry import register
from foveate.core.weights import Bits, Block, Inspected, Replaced, Stand, Stream, Weights
from foveate.ops.grid import Grid
from foveate.ops.rounding import exponent_at, hardened, indecision, levelled, mixed, shares, softened, undecided_at
from foveate.ops.solve import Moments
from foveate.ops.steps import SMALLEST, by_input, by_output, for_inputs, for_weight, nearest, nearest_inputs

ROWS = 1024
"""Rows that steps of inputs are searched on, spread evenly over all."""


@dataclass(frozen=True, eq=False)
class Curvature:
    """How much it matters that numbers ``[S, d]`` are off: ``1/2 sum diagonal * off^2`` and ``1/2 (direction . off)^2``.

    Attributes:
        diagonal: ``[d]``, not negative.
        direction: ``[d]``.
    """

    diagonal: Tensor
    direction: Tensor

    def __call__(self, off: Tensor) -> Tensor:
        """``[2]`` both, means over the rows of ``off`` ``[S, d]``."""
        return torch.stack([(self.diagonal * off.square()).sum(-1).mean(), (off @ self.direction).square().mean()]) / 2


class Pairs:
    """Sums over pairs of how far numbers are off and of the gradient there, of which a curvature is fitted."""

    def __init__(self, width: int, device: torch.device | None = None) -> None:
        self._sums = torch.zeros(3, width, dtype=torch.float64, device=device)
        self._dots = torch.zeros((), dtype=torch.float64, device=device)

    def add(self, off: Tensor, slope: Tensor) -> None:
        """Take pairs, ``[S, d]`` both; those that point against each other do not tell of a direction."""
        off, slope = off.double(), slope.double()
        dots = (off * slope).sum(-1).clamp(min=0)
        self._sums += torch.stack([(off * slope).sum(0), off.square().sum(0), dots.sqrt() @ slope])
        self._dots += dots.sum()

    @property
    def fitted(self) -> Curvature:
        """By least squares: ``H = sum g dz / sum dz^2``, 0 where negative, and ``u = sum g sqrt(dz . g) / sum dz . g``.

        As the paper has it, the root is positive: pairs on either side of the direction cancel.
        """
        products, squares, drawn = self._sums
        least = torch.finfo(squares.dtype).tiny
        diagonal = (products / squares.clamp(min=least)).clamp(min=0)
        return Curvature(diagonal.float(), (drawn / self._dots.clamp(min=least)).float())


def pieces(x: Tensor, alike: bool) -> Tensor:
    """``[S, d]`` what a block puts out: a row for each picture ``[T, n, D]`` if all are ``alike``, else for each token."""
    return x.flatten(1).float() if alike else x.reshape(-1, x.shape[-1]).float()


def balanced(terms: Tensor, first: Tensor, apart: bool) -> Tensor:
    """The sum of ``terms`` ``[2]`` relative to the ``first`` ones: to their sum, or each to its own (``apart``)."""
    least = torch.finfo(terms.dtype).tiny
    return (terms / first.clamp(min=least)).sum() if apart else terms.sum() / first.sum().clamp(min=least)


@dataclass(frozen=True, eq=False)
class Rounded:
    """Linears of a block by name: their weights and what these and their inputs are rounded to (no entry: they are not)."""

    weights: Mapping[str, Tensor]
    grids: Mapping[str, Grid]
    inputs: Mapping[str, Grid]

    def stands(self, weights: Mapping[str, Tensor], share: float = 0.0) -> dict[str, Stand]:
        """Products with ``weights``; each entry of a rounded input is left as it is by the chance ``share``."""

        def product(weight: Tensor, grid: Grid | None, x: Tensor) -> Tensor:
            if grid is not None and grid.zero is not None:
                found = levelled(x.float(), grid.scale[0, 0], grid.zero[0, 0], grid.bits).to(x.dtype)
                x = mixed(x, found, share) if share else found
            return functional.linear(x, weight.to(x.dtype))

        return {name: partial(product, weight, self.inputs.get(name)) for name, weight in weights.items()}

    def on_grids(self, integers: Mapping[str, Tensor]) -> dict[str, Stand]:
        """Products with what ``integers`` stand for."""
        return self.stands({name: self.grids[name].values(found) for name, found in integers.items()})


@register
@dataclass(frozen=True)
class LSViT(Weights):
    """Learned rounding of the encoder's blocks against a fitted curvature."""

    name = "ls_vit"
    title = "LS-ViT"
    group = "weights"
    paper = "CVPR 2026"
    helps = (
        "For a vision encoder of 4 bits or fewer with rounded inputs, given hundreds of pictures and an hour: every block "
        "learns how to round so that answers change least."
    )
    part = "encoder"
    textual = False
    streams: ClassVar[tuple[Stream, ...]] = ("exact", "reached")
    identity_at: ClassVar[Mapping[str, Any] | None] = {"bits": 16, "activations": 16}

    symmetric: bool = False
    """Whether grids of weights are symmetric; if not, each step has a zero point, too. Those of inputs always have one."""
    activations: Bits = 16
    """Bits that a linear's input is rounded to, on one grid with a learned step for all rows; 16 = none."""
    curvature: Literal["both", "diagonal", "direction", "none"] = "both"
    """What is fitted: for each number of a block's output, for one direction of it, or both; none = squared errors."""
    apart: bool = False
    """Whether both terms of the loss are relative to their own first values, as in FIMA-Q's code, and not their sum."""
    temperature: Annotated[float, AtLeast(1e-3)] = 20.0
    """That logits are divided by in the divergence of answers."""
    candidates: Annotated[int, AtLeast(16)] = 128
    """Pairs of step and zero that the search tries."""
    rounds: Annotated[int, AtLeast(0)] = 3
    """Turns of the search for steps of weights and of inputs by what linears make."""
    steps: Annotated[int, AtLeast(0)] = 20_000
    """Steps of learning for each block; 0 = weights are rounded to nearest on the grids that were found."""
    rate: Annotated[float, AtLeast(0)] = 1e-3
    """Learning rate of roundings."""
    input_rate: Annotated[float, AtLeast(0)] = 4e-5
    """Learning rate of the steps of inputs, which falls to 0 along a cosine."""
    drop: Annotated[float, In(0, 1)] = 0.5
    """Chance that a number that enters the block, or a linear, is the unquantized model's while learning."""
    decision: Annotated[float, AtLeast(0)] = 0.01
    """Weight of the penalty for roundings that have gone neither way, from a fifth of the steps on."""
    nearest: bool = True
    """Whether a block is rounded to nearest where what was learned is worse, as it is after few steps."""

    def quantize(self, block: Block) -> None:
        """Place all linears of the block at once."""
        with torch.no_grad():
            found = self.searched(block)
            integers = {name: found.grids[name].integers(weight) for name, weight in found.weights.items()}
        curvature = self.curved(block, found.on_grids(integers)) if self.steps else None
        if curvature is not None:
            learned, firm = self.learned(block, found, curvature)
            losses = [self.loss(block, curvature, one.on_grids(what)) for one, what in ((found, integers), (learned, firm))]
            if self.nearest and losses[1] > losses[0]:
                block.say(f"block {block.number}: is rounded to nearest, as what was learned in steps={self.steps} is worse")
            else:
                found, integers = learned, firm
        elif self.steps:
            block.say(f"block {block.number}: is rounded to nearest, as no answer depends on it")
        for name, numbers in integers.items():
            inputs = found.inputs.get(name)
            block.place(name, Replaced(found.grids[name], numbers, activations=self.activations, inputs=inputs))

    def searched(self, block: Block) -> Rounded:
        """The grids that change least what linears make of what the unquantized model feeds them."""
        weights = {name: block.weight(name) for names in block.groups for name in names}
        grids: dict[str, Grid] = {}
        inputs: dict[str, Grid] = {}
        for names in block.groups:
            mine, width = [weights[name] for name in names], weights[names[0]].shape[1]
            groups = 1 if self.group_size == -1 else width // self.group_size
            offered = [for_weight(one, self.bits, groups, self.candidates, self.symmetric, block.dtype) for one in mine]
            found = [nearest(*each) for each in zip(offered, mine, strict=True)]
            fed: Grid | None = None
            if self.activations < 16:
                some, low, high = _spread(block, names[0])
                steps = for_inputs(some, low, high, self.activations, self.candidates)
                fed = nearest_inputs(steps, some)
            for _ in range(self.rounds if fed is not None else min(self.rounds, 1)):
                moments = Moments(width, fed is not None, mine[0].device)
                for rows in block.exact(names[0]):
                    x = rows.x.float()
                    moments.add(x if fed is None else fed.rounded(x), None if fed is None else x)
                found = [by_output(some_of, one, moments) for some_of, one in zip(offered, mine, strict=True)]
                if fed is not None:
                    fed = by_input(steps, some, mine, [grid.rounded(one) for grid, one in zip(found, mine, strict=True)])
            grids |= dict(zip(names, found, strict=True))
            inputs |= {} if fed is None else dict.fromkeys(names, fed)
        return Rounded(weights, grids, inputs)

    @torch.no_grad()
    def curved(self, block: Block, stands: Mapping[str, Stand]) -> Curvature | None:
        """The curvature at the block's output, from how far ``stands`` put that off; None = no answer depends on it."""
        pairs, alike = None, _alike(block)
        for number, part in enumerate(block.inspect(())):
            made, wanted = part.run(part.x, stands), part.run(part.x)
            off = pieces(made, alike) - pieces(wanted, alike)
            if self.curvature == "none":
                return Curvature(torch.ones_like(off[0]), torch.zeros_like(off[0]))
            pairs = Pairs(off.shape[1], off.device) if pairs is None else pairs
            pairs.add(off, pieces(block.pull(number, made, self.temperature), alike))
        assert pairs is not None, "no batches"
        found = pairs.fitted
        diagonal = found.diagonal * (self.curvature in ("both", "diagonal"))
        direction = found.direction * (self.curvature in ("both", "direction"))
        return Curvature(diagonal, direction) if bool(diagonal.any() | direction.any()) else None

    def learned(self, block: Block, found: Rounded, curvature: Curvature) -> tuple[Rounded, dict[str, Tensor]]:
        """What the block's roundings and steps of inputs become: the grids, and the integers ``[out, in]`` by linear."""
        alphas = {name: undecided_at(one, found.grids[name]).requires_grad_() for name, one in found.weights.items()}
        steps = {names: found.inputs[names[0]].scale.clone().requires_grad_() for names in block.groups if found.inputs}
        inputs = {name: replace(found.inputs[name], scale=step) for names, step in steps.items() for name in names}
        now = Rounded(found.weights, found.grids, inputs)
        adam = torch.optim.Adam(
            [{"params": [*alphas.values()], "lr": self.rate}, {"params": [*steps.values()], "lr": self.input_rate}]
        )
        alike, first, turns = _alike(block), None, _turns(block)
        with torch.no_grad():
            targets = [part.run(part.x).cpu() for part in block.inspect(())]
        for step in range(1, self.steps + 1):
            number, exact, reached = next(turns)
            with torch.enable_grad():
                up = {name: shares(alpha) for name, alpha in alphas.items()}
                soft = {name: softened(one, found.grids[name], up[name]) for name, one in found.weights.items()}
                x = mixed(exact.x, reached.x, self.drop) if self.drop else reached.x
                made = reached.run(x, now.stands(soft, self.drop))
                terms = curvature(pieces(made, alike) - pieces(targets[number].to(made.device), alike))
                first = terms.detach() if first is None else first
                loss = balanced(terms, first, self.apart)
                exponent = exponent_at(step, self.steps)
                if exponent is not None:
                    loss = loss + self.decision * sum(indecision(share, exponent) for share in up.values())
                adam.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
            adam.param_groups[1]["lr"] = self.input_rate * (1 + math.cos(math.pi * (step - 1) / self.steps)) / 2
            adam.step()
            for scale in steps.values():
                scale.data.clamp_(min=SMALLEST)
        with torch.no_grad():
            firm = {name: hardened(one, found.grids[name], alphas[name]) for name, one in found.weights.items()}
            inputs = {name: replace(grid, scale=grid.scale.detach()) for name, grid in inputs.items()}
            return Rounded(found.weights, found.grids, inputs), firm

    @torch.no_grad()
    def loss(self, block: Block, curvature: Curvature, stands: Mapping[str, Stand]) -> float:
        """What is off at the block's output with ``stands``, given what quantized blocks before it make."""
        total, alike = 0.0, _alike(block)
        for exact, reached in zip(block.inspect((), "exact"), block.inspect((), "reached"), strict=True):
            made, wanted = reached.run(reached.x, stands), exact.run(exact.x)
            total += float(curvature(pieces(made, alike) - pieces(wanted, alike)).sum()) * len(pieces(made, alike))
        return total


def _alike(block: Block) -> bool:
    """Whether rows come picture by picture, all of one number of tokens."""
    shapes = {tuple(part.x.shape[1:]) for part in block.inspect(())}
    return len(shapes) == 1 and len(shapes.pop()) == 2


def _turns(block: Block) -> Iterator[tuple[int, Inspected, Inspected]]:
    """Batches one after the other, without end: the number, and the block on what either model feeds it."""
    while True:
        yield from zip(count(), block.inspect((), "exact"), block.inspect((), "reached"))


def _spread(block: Block, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Some rows ``[n, in]`` of a linear's inputs, and the least and the largest number of all rows."""
    sizes, ends = [], []
    for rows in block.exact(name):
        sizes.append(len(rows.x))
        ends.append(torch.stack(rows.x.float().aminmax()))
    every, some, start = -(-sum(sizes) // ROWS), [], 0
    for size, rows in zip(sizes, block.exact(name), strict=True):
        some.append(rows.x[-start % every :: every].float())
        start += size
    low, high = torch.stack(ends).T
    return torch.cat(some), low.amin(), high.amax()
