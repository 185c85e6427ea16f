"""Column by column: closed forms, brute force, and what the streams may and may not change."""

from __future__ import annotations

from functools import partial
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.ops.grid import Grid
from foveate.ops.solve import Factored, Finder, Moments, cholesky, loss, whitened


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(x: Tensor, exact: Tensor | None = None) -> Moments:
    """Of one sample's rows ``[t, n]``."""
    found = Moments(x.shape[1], paired=exact is not None)
    found.add(x, exact)
    return found


def finder(bits: int = 3, group: int = -1, symmetric: bool = True) -> Finder:
    return lambda weight, columns: Grid.of(weight, bits, group, symmetric)


def steps(step: float) -> Finder:
    """A grid of four bits whose steps are ``step``, whatever the weight."""
    return lambda weight, columns: Grid(4, torch.full((len(weight), 1), step, dtype=weight.dtype))


X = torch.tensor([[1.0, 0.0], [1.0, 1.0]], dtype=torch.float64)
"""The card's second example, tokens by inputs."""
EXACT = X + torch.tensor([[0.1, 0.0], [0.0, 0.0]], dtype=torch.float64)


def test_the_cards_two_columns_solved_by_hand() -> None:
    found = moments(X, EXACT)
    factored = Factored.of(found.own, found.ahead, alpha=1, correction=1, damping=0)
    weight = torch.tensor([[0.6, -0.3]], dtype=torch.float64)
    integers, grid = factored.solve(weight, steps(0.25))
    got = grid.values(integers)

    assert_close(factored.upper, torch.tensor([[1.0, -1.0], [0.0, 1.0]], dtype=torch.float64) / 2**0.5)
    assert factored.shift is not None
    assert factored.ahead is not None
    assert_close(factored.shift, torch.tensor([0.1, 0.0], dtype=torch.float64))
    assert_close(factored.ahead, torch.zeros_like(factored.ahead))
    assert got.tolist() == [[0.75, -0.5]]
    assert_close(((X @ got.T - EXACT @ weight.T) ** 2).sum(), torch.tensor(0.0106, dtype=torch.float64))
    # The best of all points, and far below rounding.
    points = [torch.tensor([point], dtype=torch.float64) / 4 for point in product(range(-8, 8), repeat=2)]
    assert_close(min(float(((X @ p.T - EXACT @ weight.T) ** 2).sum()) for p in points), 0.0106)
    rounded = grid.rounded(weight)
    assert_close(float(((X @ rounded.T - EXACT @ weight.T) ** 2).sum()), 0.0281)


def test_the_cards_first_example() -> None:
    x = torch.eye(2, dtype=torch.float64)
    exact = torch.tensor([[1.2, 0.0], [0.0, 1.0]], dtype=torch.float64)
    found = moments(x, exact)
    factored = Factored.of(found.own, found.ahead, correction=1, damping=0)

    assert factored.shift is not None
    assert_close(factored.shift, torch.tensor([0.2, 0.0], dtype=torch.float64))
    integers, grid = factored.solve(torch.ones(1, 2, dtype=torch.float64), steps(0.2))
    assert_close(grid.values(integers), torch.tensor([[1.2, 1.0]], dtype=torch.float64))


def test_the_correction_is_the_optimum_of_what_is_left() -> None:
    """``C_q`` equals the first entry of ``P[q, q:] H[q:, q:]^-1`` for every q."""
    x = random(12, 5)
    found = moments(x, x + random(12, 5, seed=1))
    own, ahead = found.own, found.ahead
    assert ahead is not None
    shift = Factored.of(own, ahead, correction=1, damping=0).shift

    want = [ahead[q, q:] @ torch.linalg.inv(own[q:, q:])[:, 0] for q in range(5)]
    assert shift is not None
    assert_close(shift, torch.stack(want))


@pytest.mark.parametrize("group", [-1, 4])
def test_inputs_that_are_strangers_decouple(group: int) -> None:
    """With a diagonal H nothing is made up for: plain rounding, of targets that move by ``P_qq / H_qq``."""
    weight, own = random(6, 16), torch.diag(torch.rand(16, dtype=torch.float64) + 0.5)
    integers, grid = Factored.of(own, damping=0).solve(weight, finder(group=group), group)

    assert torch.equal(grid.values(integers), Grid.of(weight, 3, group).rounded(weight))
    ahead = torch.diag(random(16, seed=2)) / 10
    integers, grid = Factored.of(own, ahead, correction=1, damping=0).solve(weight, finder(group=group), group)
    want = grid.rounded(weight * (1 + ahead.diagonal() / own.diagonal()))
    assert torch.equal(grid.values(integers), want)


def test_two_columns_against_every_point_of_the_grid() -> None:
    """The second column is made the best of for whatever the first became; both together are near the best there is."""
    gains = []
    for seed in range(20):
        own, weight = moments(random(8, 2, seed=seed)).own, random(1, 2, seed=seed + 100)
        integers, grid = Factored.of(own, damping=0).solve(weight, finder())
        points = torch.tensor(list(product(range(-4, 4), repeat=2)), dtype=torch.float64)[:, None]
        each = loss(weight, grid.values(points), own)
        same_first = points[:, 0, 0] == integers[0, 0]
        got = loss(weight, grid.values(integers), own)
        assert_close(got, each[same_first].amin())
        gains.append(float(got / each.amin()))
        assert got <= loss(weight, grid.rounded(weight), own) * 1.5
    assert sum(gain < 1.0 + 1e-9 for gain in gains) >= 15


def test_it_beats_rounding_on_average() -> None:
    ratios = []
    for seed in range(5):
        mixing = random(32, 32, seed=seed)
        own, weight = moments(random(200, 32, seed=seed + 50) @ mixing).own, random(24, 32, seed=seed + 70)
        integers, grid = Factored.of(own).solve(weight, finder(4))
        ratios.append(float(loss(weight, grid.values(integers), own) / loss(weight, grid.rounded(weight), own)))
    assert sum(ratios) / len(ratios) < 0.6


def test_the_other_stream_lowers_the_error_to_the_exact_output() -> None:
    x = random(400, 24) @ random(24, 24, seed=1)
    exact = x + 0.1 * x @ random(24, 24, seed=3)
    found, weight = moments(x, exact), random(16, 24, seed=4)
    assert found.ahead is not None

    def error(factored: Factored) -> float:
        integers, grid = factored.solve(weight, finder(4))
        return float((x @ grid.values(integers).T - exact @ weight.T).square().sum())

    assert error(Factored.of(found.own, found.ahead, alpha=1)) < 0.9 * error(Factored.of(found.own))


def test_equal_streams_change_nothing() -> None:
    x, weight = random(50, 16), random(8, 16, seed=1)
    found = moments(x, x)
    plain = Factored.of(found.own).solve(weight, finder())
    both = Factored.of(found.own, found.ahead, correction=1).solve(weight, finder())

    assert torch.equal(plain[0], both[0])
    assert torch.equal(plain[1].scale, both[1].scale)


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("group", [-1, 8])
def test_blocks_change_nothing_where_grids_stand_first(ordered: bool, group: int) -> None:
    x, weight = random(80, 32), random(8, 32, seed=1)
    found = moments(x, x + random(80, 32, seed=2) / 5)
    factored = Factored.of(found.own, ordered=ordered)
    solve = partial(factored.solve, weight, finder(4, group), group, static=True)

    assert torch.equal(solve(block=32)[0], solve(block=5)[0])


def test_dead_inputs_become_zero() -> None:
    x, weight = random(40, 8), random(4, 8, seed=1)
    x[:, 3] = 0
    exact = x.clone()
    exact[:, 3] = 1
    found = moments(x, exact)
    for symmetric, ordered in product((True, False), repeat=2):
        factored = Factored.of(found.own, found.ahead, correction=1, ordered=ordered)
        integers, grid = factored.solve(weight, finder(3, -1, symmetric))
        assert factored.dead.tolist() == [False] * 3 + [True] + [False] * 4
        assert not grid.values(integers)[:, 3].any()


def test_stacked_rows_are_solved_as_they_are_alone() -> None:
    found, weight = moments(random(40, 16)), random(8, 16, seed=1)
    factored = Factored.of(found.own)
    together, _ = factored.solve(torch.cat([weight, weight[:3]]), finder(3, 4), 4)

    assert torch.equal(together[:8], factored.solve(weight, finder(3, 4), 4)[0])
    assert torch.equal(together[8:], together[:3])


def test_batches_and_a_set_shown_twice_change_nothing() -> None:
    x, exact = random(40, 16), random(40, 16, seed=1)
    whole = moments(x, exact)
    parts = Moments(16, paired=True)
    for _ in range(2):
        for rows in (slice(0, 13), slice(13, 40)):
            parts.add(x[rows], exact[rows], samples=rows == slice(0, 13))

    assert_close(parts.own, whole.own)
    assert_close(parts.ahead, whole.ahead)


def test_the_loss_is_the_error_of_the_output() -> None:
    x, exact, weight = random(30, 8), random(30, 8, seed=1), random(4, 8, seed=2)
    found = moments(x, exact)
    rounded = torch.stack([Grid.of(weight, bits).rounded(weight) for bits in (2, 3, 4)])
    want = ((x @ rounded.mT - exact @ weight.T) ** 2).sum((1, 2)) * 2
    without = ((x @ weight.T - exact @ weight.T) ** 2).sum() * 2

    assert_close(loss(weight, rounded, found.own, found.ahead), want - without)
    assert_close(loss(weight, rounded, found.own), ((x @ (rounded - weight).mT) ** 2).sum((1, 2)) * 2)


def test_damping_rises_until_it_is_enough_and_no_further_than_told() -> None:
    row = random(1, 6)
    lower, damping = cholesky(row.T @ row - 1e-3 * torch.eye(6, dtype=torch.float64), 1e-4)

    assert damping > 1e-4
    assert lower.isfinite().all()
    with pytest.raises(FoveateError, match="are activations finite"):
        cholesky(torch.full((3, 3), float("nan"), dtype=torch.float64), 0.01)


def test_the_cards_whitened_truncation() -> None:
    tokens = torch.tensor([[3.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    left, right = whitened(torch.eye(2, dtype=torch.float64), tokens.T @ tokens, 1, damping=0)

    assert_close(left @ right, torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64)))


def test_whitened_truncation_is_the_best_of_its_rank() -> None:
    x, error = random(60, 10) @ random(10, 10, seed=3), random(8, 10, seed=1)
    own = x.T @ x
    losses = []
    for rank in range(0, 9):
        left, right = whitened(error, own, rank, damping=0)
        losses.append(float((x @ (error - left @ right).T).square().sum()))
        near = (left + 0.01 * random(*left.shape, seed=5)) @ (right + 0.01 * random(*right.shape, seed=6))
        assert losses[-1] <= float((x @ (error - near).T).square().sum()) + 1e-9
        u, s, v = torch.linalg.svd(error, full_matrices=False)
        plain = u[:, :rank] * s[:rank] @ v[:rank]
        assert losses[-1] <= float((x @ (error - plain).T).square().sum()) + 1e-9
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 1e-18


def test_fewer_rows_than_inputs_are_enough() -> None:
    x, error = random(4, 10), random(8, 10, seed=1)
    left, right = whitened(error, x.T @ x, 4)

    assert_close(x @ (left @ right).T, x @ error.T, atol=1e-3, rtol=0)
