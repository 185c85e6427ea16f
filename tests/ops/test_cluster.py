"""Density peaks, and the members that a cluster lists."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops.cluster import density_peaks, members

LINE = torch.tensor([0.0, 0.1, 0.25, 0.3, 5.0, 5.1, 5.25, 9.0, 9.12, 9.2])[None, :, None]
"""Three heaps on a line, of four, three and three tokens."""
HEAP = torch.tensor([0, 0, 0, 0, 1, 1, 1, 2, 2, 2])


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, int, int]:
    """Tokens ``[2, N, 4]``, clusters, neighbours."""
    count = draw(st.integers(1, 12))
    tokens = torch.randn(2, count, 4, generator=torch.Generator().manual_seed(draw(st.integers(0, 999))))
    return tokens, draw(st.integers(1, count)), draw(st.integers(1, 6))


def published(x: Tensor, count: int, neighbours: int) -> tuple[list[int], list[int]]:
    """The same for one image, token by token, as densities."""
    tokens = x.double()
    distance = [[float((a - b).norm()) / len(a) ** 0.5 for b in tokens] for a in tokens]
    k = min(neighbours, len(tokens))
    density = [torch.tensor([-sum(d * d for d in sorted(row)[:k]) / k]).double().exp().item() for row in distance]
    farthest = max(map(max, distance))
    rank = {i: place for place, i in enumerate(sorted(range(len(tokens)), key=lambda i: (-density[i], i)))}
    gap = [min([d for j, d in enumerate(row) if rank[j] < rank[i]], default=farthest) for i, row in enumerate(distance)]
    centres = sorted(range(len(tokens)), key=lambda i: (-gap[i] * density[i], i))[:count]
    nearest = [min(range(count), key=lambda j: (distance[centres[j]][i], j)) for i in range(len(tokens))]
    return centres, [centres.index(i) if i in centres else cluster for i, cluster in enumerate(nearest)]


def heaps(x: Tensor) -> list[int]:
    """The heap of the centre that each token of `LINE` joined."""
    centres, cluster = density_peaks(x, 3, 3)
    return HEAP[centres[0]][cluster[0]].tolist()


def test_every_heap_is_a_cluster() -> None:
    assert heaps(LINE) == HEAP.tolist()


@given(problems())
def test_it_is_the_published_rule_token_by_token(problem: tuple[Tensor, int, int]) -> None:
    tokens, count, neighbours = problem
    if neighbours == 2:
        neighbours = 3  # two that are each other's nearest are equally dense up to rounding
    centres, cluster = density_peaks(tokens, count, neighbours)

    for image in range(2):
        assert (centres[image].tolist(), cluster[image].tolist()) == published(tokens[image], count, neighbours)


@given(problems())
def test_every_cluster_has_its_own_centre(problem: tuple[Tensor, int, int]) -> None:
    tokens, count, neighbours = problem
    centres, cluster = density_peaks(tokens, count, neighbours)

    assert torch.equal(cluster.gather(1, centres), torch.arange(count).expand(2, -1))


def test_tokens_that_are_all_alike_are_clustered_by_index() -> None:
    centres, cluster = density_peaks(torch.ones(1, 5, 3), 2, 3)

    assert centres.tolist() == [[0, 1]]
    assert cluster.tolist() == [[0, 1, 0, 0, 0]]


def test_densities_that_would_underflow_still_differ() -> None:
    # squared distances of 1e8: every density would be zero in float32, and the first three tokens the centres
    centres, _ = density_peaks(LINE * 1e5, 3, 3)

    assert centres[0].tolist() != [0, 1, 2]


def test_of_two_tokens_as_dense_as_each_other_one_is_the_peak() -> None:
    # with itself as its only neighbour every token is as dense as any
    centres, _ = density_peaks(torch.tensor([0.0, 0.1, 7.0, 7.1])[None, :, None], 2, 1)

    assert centres.tolist() == [[0, 2]]


@given(problems(), st.integers(1, 9))
def test_members_are_listed_in_order_and_then_again(problem: tuple[Tensor, int, int], slots: int) -> None:
    tokens, count, neighbours = problem
    _, cluster = density_peaks(tokens, count, neighbours)
    order = torch.stack([torch.randperm(cluster.shape[1], generator=torch.Generator().manual_seed(i)) for i in range(2)])
    listed = members(cluster, order, count, slots)

    for image in range(2):
        for number in range(count):
            mine = [token for token in order[image].tolist() if cluster[image, token] == number]
            assert listed[image, number].tolist() == [mine[slot % len(mine)] for slot in range(slots)]
