"""MBQ: AWQ's search, in which visual tokens weigh as much as the loss depends on them, compared with words of the answer.

Paper: "MBQ: Modality-Balanced Quantization for Large Vision-Language Models", arXiv 2412.19509. As in the published code a
block takes its own ratio of gradients or the median over blocks, whichever is larger, and there is no clipping unless asked
for. Rows that are neither visual nor of an answer do not count; in samples without an answer all words stand for it (own
reading).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Literal

import torch
from torch import Tensor

from foveate.core.registry import register
from foveate.core.roles import VISUAL, Role
from foveate.core.weights import Block, Inspected, Rows
from foveate.methods.weights.awq import AWQ, Heed


def row_weights(visual: Tensor, answer: Tensor, ratio: float, counts: tuple[int, int], squared: bool) -> Tensor:
    """What rows weigh, in the shape of the masks.

    Args:
        visual, answer: bool, which rows are what.
        ratio: of what a visual row weighs to what a row of an answer does.
        counts: visual rows and rows of answers over all batches.
        squared: whether squared errors are weighed: then the means of either kind are added, else it is one mean over both.
    """
    many = (max(counts[0], 1), max(counts[1], 1)) if squared else (sum(counts), sum(counts))
    return visual * (ratio / many[0]) + answer / many[1]


def parted(role: Tensor, sample: Tensor, roles: Sequence[int] = VISUAL) -> tuple[Tensor, Tensor]:
    """Which rows are visual, and which count as an answer: of samples without one, all their words.

    Args:
        role: of each row.
        sample: which sample it is of, in the same shape.
        roles: of the rows that are asked for, in the place of visual ones.
    """
    answer, text = role == Role.ANSWER, role == Role.TEXT
    told = torch.zeros(int(sample.amax()) + 1, dtype=torch.bool, device=role.device)
    told = told.index_fill(0, sample[answer], True)
    return torch.isin(role, role.new_tensor(roles)), answer | (text & ~told[sample])


def gradient_ratio(batches: Sequence[Rows], roles: Sequence[int] = VISUAL) -> float:
    """How much larger the gradient is at visual rows (at those of ``roles``) than at an answer's.

    Means over rows, and over samples of those.
    """
    sums = torch.zeros(2, dtype=torch.float64)
    for rows in batches:
        size, count = rows.x[:, 0].double(), int(rows.sample.amax()) + 1
        for place, mask in enumerate(parted(rows.role, rows.sample, roles)):
            many = torch.bincount(rows.sample[mask], minlength=count)
            total = torch.bincount(rows.sample[mask], size[mask], minlength=count)
            sums[place] += (total / many.clamp(min=1)).sum().cpu()
    visual, answer = sums.tolist()
    return visual / answer if answer else 1.0


@register
@dataclass(frozen=True)
class MBQ(AWQ):
    """AWQ with visual tokens weighed by gradients."""

    name = "mbq"
    title = "MBQ"
    paper = "arXiv 2412.19509"
    helps = (
        "Instead of AWQ where samples have answers: visual tokens, which are many and matter little each, no longer drown "
        "the words."
    )
    textual = False

    loss: Literal["mae", "mse"] = "mae"
    """What the search compares outputs by: mean absolute or mean squared errors."""
    clip: bool = False
    """Whether the range of each row or group is then cut to where its part of the output changes least (as in AWQ)."""

    def heed(self, block: Block, names: Sequence[str]) -> Heed:
        """Visual rows by the ratio of gradients at what the part of the block puts out, rows of answers by 1."""
        part = names[0].rpartition(".")[0]
        last = [name for group in block.groups for name in group if name.rpartition(".")[0] == part][-1]
        ratios = [gradient_ratio(batches) for batches in block.slopes(last)]
        ratio = max(ratios[block.number], median(ratios))
        counts = torch.zeros(2, dtype=torch.long)
        for rows in block.exact(names[0]):
            counts += torch.stack([mask.sum().cpu() for mask in parted(rows.role, rows.sample)])
        many = (int(counts[0]), int(counts[1]))

        def weigh(part: Inspected) -> Tensor:
            role = part.role.to(part.x.device)
            sample = torch.arange(len(role), device=role.device)[:, None].expand_as(role)
            return row_weights(*parted(role, sample), ratio, many, self.loss == "mse")

        return weigh
