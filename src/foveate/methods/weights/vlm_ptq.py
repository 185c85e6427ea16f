"""VLM-PTQ: GPTAQ whose targets are shifted in closed form, and whose steps heed visual and other inputs in a searched ratio.

Paper: "Efficient Post-Training Quantization for Large Vision-Language Models", CVPR 2026. There is no published code: the
solver is held by the vectors of GPTAQ, which it extends, and what it adds by closed forms. Reconstructed: that GPTAQ's
`alpha` does not damp the correction, the candidates of `mu`, that each is scored by the whole solve (`mu_search`) and on all
samples. Activations are rounded on symmetric grids, where the paper's W2A8 has asymmetric ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.parameters import In
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.weights import Bits, Block
from foveate.methods.weights.gptaq import GPTAQ
from foveate.methods.weights.gptq import Solver
from foveate.ops.grid import Grid, tokens
from foveate.ops.solve import Factored, Moments, loss

MUS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)
"""Shares of visual rows that are tried (reconstructed: the paper has about six)."""


def importance(x: Tensor, visual: Tensor) -> Tensor:
    """``[2, in]`` sums of squares of each input over visual rows, and over all others.

    Args:
        x: ``[n, in]`` rows.
        visual: ``[n]`` bool.
    """
    squares = x.double().square()
    return torch.stack([squares[visual].sum(0), squares[~visual].sum(0)])


def mixed(sums: Tensor, mu: float) -> Tensor:
    """``[in]`` importance of inputs, of the two sums ``[2, in]``: ``mu`` of the visual one, the rest of the other."""
    return mu * sums[0] + (1 - mu) * sums[1]


@register
@dataclass(frozen=True)
class VLMPTQ(GPTAQ):
    """Columns in turn, towards shifted targets, on steps that heed modalities."""

    name = "vlm_ptq"
    title = "VLM-PTQ"
    paper = "CVPR 2026"
    helps = "For weights of 3 or 2 bits, where samples hold pictures and words; the slowest of the solvers here."
    textual = False

    bits: Bits = 3
    """Bits of a weight; 16 leaves the model as it is. With 2 the paper has ``group_size=128, symmetric=False``."""
    correction: Annotated[float, In(0, 1)] = 1.0
    """Share of the shift of targets."""
    mu: Annotated[float, In(0, 1)] | None = None
    """Share of visual rows in the importance of inputs; None = the best of six, for each linear."""
    mu_search: Literal["solve", "rtn"] = "solve"
    """What the candidates are compared by: the solved weight, or the weight rounded to their steps (faster)."""

    def factored(self, moments: Moments) -> Factored:
        """What the linears with these moments are rounded by."""
        return Factored.of(
            moments.own,
            moments.ahead,
            alpha=self.alpha,
            correction=self.correction,
            damping=self.damping,
            ordered=self.ordered,
        )

    def solver(self, block: Block, names: Sequence[str], moments: Moments, factored: Factored) -> Solver:
        """What finds integers and grids of these linears."""
        sums = moments.own.new_zeros(2, len(moments.own))
        for rows in block.reached(names[0]):
            visual = torch.isin(rows.role, rows.role.new_tensor(VISUAL))
            sums += importance(tokens(rows.x.float(), self.activations), visual).to(sums.dtype)
        own, ahead = moments.own, moments.ahead
        return lambda weight: self.best(weight, factored, sums, own, ahead, block.dtype)

    def best(
        self,
        weight: Tensor,
        factored: Factored,
        sums: Tensor,
        own: Tensor,
        ahead: Tensor | None,
        stored: torch.dtype | None = None,
    ) -> tuple[Tensor, Grid]:
        """Integers ``[out, in]`` and their grid for the share of visual rows that brings outputs nearest to the exact ones.

        Args:
            weight: ``[out, in]``.
            factored: what its columns are rounded by.
            sums: ``[2, in]`` as `importance` gives them.
            own, ahead: the moments of its inputs.
            stored: the dtype that steps are written in.
        """
        if self.mu is not None or not self.clip:
            return self.solved(weight, factored, mixed(sums, self.mu or 0), stored)
        if self.mu_search == "rtn":
            grids = [self.heeding(weight, mixed(sums, mu), stored) for mu in MUS]
            losses = torch.stack([loss(weight, grid.rounded(weight), own, ahead) for grid in grids])
            return self.solved(weight, factored, mixed(sums, MUS[int(losses.argmin())]), stored)
        tried = (self.solved(weight, factored, mixed(sums, mu), stored) for mu in MUS)
        return min(tried, key=lambda found: float(loss(weight, found[1].values(found[0]), own, ahead)))

    def solved(self, weight: Tensor, factored: Factored, heed: Tensor, stored: torch.dtype | None) -> tuple[Tensor, Grid]:
        """Integers and grid for one importance ``heed`` ``[in]`` of inputs."""
        return factored.solve(weight, lambda columns, where: self.heeding(columns, heed[where], stored), self.group_size)

    def heeding(self, weight: Tensor, heed: Tensor, stored: torch.dtype | None) -> Grid:
        """The grid of some columns, by the importance ``heed`` of each; where all are worth nothing, all are alike."""
        if not self.clip:
            return Grid.of(weight.float(), self.bits, self.group_size, self.symmetric, stored=stored)
        heed = torch.where(heed.any(), heed, torch.ones_like(heed))
        return Grid.searched(weight.float(), self.bits, self.group_size, self.symmetric, importance=heed, stored=stored)
