"""Groups of similar tokens, and of neighbouring ones."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops.select import top_k


def density_peaks(x: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """DPC-KNN: centres are tokens in dense places that are far from any denser token; the others join the nearest centre.

    Density is ``exp(-mean d^2)`` over a token's ``neighbours`` nearest tokens, itself included; d is the Euclidean distance
    over ``sqrt(D)``. A token's score is its density times its distance to the nearest denser token (for the densest: times
    the largest distance there is); of equals the first is the denser. Compared as logarithms, which do not underflow. Takes
    ``I * N * N`` floats.

    Args:
        x: ``[I, N, D]`` tokens.
        count: clusters, at most N.
        neighbours: of the density.

    Returns:
        ``[I, count]`` the centres, best score first, and ``[I, N]`` the cluster of each token.
    """
    images, tokens, width = x.shape
    distance = torch.cdist(x.float(), x.float()) / width**0.5
    nearest = distance.topk(min(neighbours, tokens), dim=2, largest=False).values
    density = -nearest.square().mean(2)
    one, other = density[:, :, None], density[:, None, :]
    denser = (other > one) | (other == one) & torch.ones_like(distance, dtype=torch.bool).tril(-1)
    gap = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(2)
    centres = top_k(gap.log() + density, count)
    to_centres = distance.gather(1, centres[..., None].expand(-1, -1, tokens))
    number = torch.arange(count, device=x.device).expand(images, -1)
    # A centre that coincides with another one stays its own.
    return centres, to_centres.argmin(1).scatter(1, centres, number)


def members(cluster: Tensor, order: Tensor, count: int, slots: int) -> Tensor:
    """The first ``slots`` members of each cluster; from the start again where it has fewer.

    Args:
        cluster: ``[I, N]`` cluster of each token, every one of ``count`` with a member at least.
        order: ``[I, N]`` the tokens, those to be listed first in front.
        count: clusters.
        slots: members to list.

    Returns:
        ``[I, count, slots]`` tokens.
    """
    grouped = order.gather(1, cluster.gather(1, order).argsort(dim=1, stable=True))
    sizes = cluster.new_zeros(len(cluster), count).scatter_add(1, cluster, torch.ones_like(cluster))
    nth = torch.arange(slots, device=cluster.device) % sizes[..., None]
    return grouped.gather(1, (nth + (sizes.cumsum(1) - sizes)[..., None]).flatten(1)).reshape(nth.shape)


def connected(right: Tensor, down: Tensor) -> Tensor:
    """Connected parts of grids whose neighbouring cells may belong together.

    A root takes over the smallest root next to its part, and every cell the root of its root, until nothing changes: rounds
    grow like the logarithm of the longest way through a part, and each waits for the device once.

    Args:
        right: ``[I, R, C - 1]`` bool, whether a cell and the one to its right belong together.
        down: ``[I, R - 1, C]`` bool, the same for the one below it.

    Returns:
        ``[I, R * C]`` the smallest raster index in the part of each cell.
    """
    images, rows, columns = right.shape[0], right.shape[1], down.shape[2]
    root = torch.arange(rows * columns, device=right.device).expand(images, -1)
    while True:
        grid = root.reshape(images, rows, columns)
        least = grid.clone()
        least[:, :, 1:] = torch.where(right, least[:, :, 1:].minimum(grid[:, :, :-1]), least[:, :, 1:])
        least[:, :, :-1] = torch.where(right, least[:, :, :-1].minimum(grid[:, :, 1:]), least[:, :, :-1])
        least[:, 1:] = torch.where(down, least[:, 1:].minimum(grid[:, :-1]), least[:, 1:])
        least[:, :-1] = torch.where(down, least[:, :-1].minimum(grid[:, 1:]), least[:, :-1])
        joined = least.flatten(1).minimum(root.scatter_reduce(1, root, least.flatten(1), "amin"))
        joined = joined.gather(1, joined)
        joined = joined.gather(1, joined)
        if torch.equal(joined, root):
            return root
        root = joined
