"""What goes together: from how often things are seen at once to groups of them."""

from __future__ import annotations

import torch
from torch import Tensor

STARTS = 10
"""Of k-means, of which the best end counts."""
ROUNDS = 100
"""Of k-means, at most."""


def npmi(joint: Tensor) -> Tensor:
    """Normalised pointwise mutual information ``[n, n]``: 1 = always together, 0 = as by chance, -1 = never.

    Args:
        joint: ``[n, n]`` shares of observations in which both are there, those of single ones on the diagonal.
    """
    single = joint.diagonal()
    found = (joint / (single[:, None] * single)).log() / -joint.log()
    return torch.where(joint <= 0, -1.0, torch.where(joint >= 1, 1.0, found)).clamp(-1, 1)


def spectral(affinity: Tensor, count: int, seed: int = 0) -> Tensor:
    """``[n]`` groups, 0 to ``count - 1``, of what is alike by ``affinity`` ``[n, n]``; below 0 counts as not alike at all.

    The first eigenvectors of the normalised Laplacian, each row over the root of its degree, by k-means.
    """
    near = affinity.double().clamp(min=0)
    near = (near + near.mT) / 2
    near.fill_diagonal_(1)
    root = near.sum(1).sqrt()
    laplacian = torch.eye(len(near), dtype=near.dtype, device=near.device) - near / root / root[:, None]
    vectors = torch.linalg.eigh(laplacian).eigenvectors[:, :count]
    return kmeans(vectors / root[:, None], count, seed)


def kmeans(x: Tensor, count: int, seed: int = 0) -> Tensor:
    """``[n]`` the nearest of ``count`` centres of the rows ``x`` ``[n, d]``, from the best of `STARTS` drawn starts.

    A start draws centres among the rows, each by its squared distance to those drawn before (k-means++). A centre that is
    nearest to no row stays.
    """
    generator = torch.Generator().manual_seed(seed)  # of the host: every device gets the same numbers
    rows = x.double()
    drawn = torch.rand(count, STARTS, 1, generator=generator, dtype=torch.double).to(x.device)
    centres = rows[(drawn[0, :, 0] * len(rows)).long()][:, None]
    for draw in drawn[1:]:
        far = torch.cdist(rows.expand(STARTS, -1, -1), centres).amin(-1).square().cumsum(1)
        place = torch.searchsorted(far, draw * far[:, -1:], right=True).clamp(max=len(rows) - 1)
        centres = torch.cat([centres, rows[place]], dim=1)
    nearest = torch.full((STARTS, len(rows)), -1, device=x.device)
    for _ in range(ROUNDS):
        distance = torch.cdist(rows.expand(STARTS, -1, -1), centres)
        before, nearest = nearest, distance.argmin(-1)
        if torch.equal(before, nearest):
            break
        mine = torch.nn.functional.one_hot(nearest, count).to(rows.dtype)
        sizes = mine.sum(1)[..., None]
        centres = torch.where(sizes > 0, mine.mT @ rows / sizes.clamp(min=1), centres)
    spread = torch.cdist(rows.expand(STARTS, -1, -1), centres).amin(-1).square().sum(1)
    return nearest[spread.argmin()]
