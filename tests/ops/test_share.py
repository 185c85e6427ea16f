"""What is dealt out adds up, stays within its bounds, and follows the weights."""

from __future__ import annotations

from fractions import Fraction
from math import floor

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.ops.share import dealt


def shared(weights: list[float], total: int, most: list[int], least: list[int] | None = None) -> list[int]:
    bounds = torch.tensor(most), None if least is None else torch.tensor(least)
    return dealt(torch.tensor(weights, dtype=torch.float64), torch.tensor(total), *bounds).tolist()  # type: ignore[no-any-return]


def by_hand(weights: list[int], total: int, most: list[int]) -> list[int]:
    """The same in fractions, capping one round after the other."""
    left, shares, open_ = total, [Fraction(0)] * len(weights), list(range(len(weights)))
    while open_:
        unit = Fraction(left, sum(weights[i] for i in open_))
        capped = [i for i in open_ if unit * weights[i] > most[i]]
        for i in capped or open_:
            shares[i] = Fraction(most[i]) if capped else unit * weights[i]
        left -= sum(most[i] for i in capped)
        open_ = [i for i in open_ if i not in capped] if capped else []
    counts = [floor(share) for share in shares]
    ranking = sorted(range(len(shares)), key=lambda i: (counts[i] - shares[i], i))
    for i in ranking[: total - sum(counts)]:
        counts[i] += 1
    return counts


@st.composite
def claims(draw: st.DrawFn, least_weight: int = 0) -> tuple[list[int], int, list[int], list[int]]:
    parts = draw(st.integers(1, 7))
    weights = draw(st.lists(st.integers(least_weight, 20), min_size=parts, max_size=parts))
    most = draw(st.lists(st.integers(0, 30), min_size=parts, max_size=parts))
    least = [draw(st.integers(0, bound)) for bound in most]
    return weights, draw(st.integers(sum(least), sum(most))), most, least


@given(claims())
def test_the_total_is_exact_and_bounds_hold(drawn: tuple[list[int], int, list[int], list[int]]) -> None:
    weights, total, most, least = drawn
    counts = shared([float(w) for w in weights], total, most, least)

    assert sum(counts) == total
    assert all(low <= count <= high for low, count, high in zip(least, counts, most))


@given(claims(least_weight=1))
def test_caps_are_dealt_out_as_in_fractions(drawn: tuple[list[int], int, list[int], list[int]]) -> None:
    weights, total, most, _ = drawn

    assert shared([float(w) for w in weights], total, most) == by_hand(weights, total, most)


@given(claims(), st.floats(1e-6, 1e6))
def test_only_the_proportion_of_weights_counts(drawn: tuple[list[int], int, list[int], list[int]], scale: float) -> None:
    weights, total, most, least = drawn

    assert shared([w * scale for w in weights], total, most, least) == shared(
        [float(w) for w in weights], total, most, least
    )


@given(st.lists(st.integers(0, 20), min_size=2, max_size=7), st.integers(0, 60))
def test_who_weighs_more_gets_no_less(weights: list[int], total: int) -> None:
    counts = shared([float(w) for w in weights], total, [30] * len(weights))

    assert all(a >= b for w, a in zip(weights, counts) for v, b in zip(weights, counts) if w > v)


def test_of_equal_fractions_the_lowest_index_goes_first() -> None:
    assert shared([1.25, 0.75], 20, [100, 100]) == [13, 7]
    assert shared([1.0] * 4, 6, [9] * 4) == [2, 2, 1, 1]


def test_without_any_weight_all_get_the_same() -> None:
    assert shared([0.0, 0.0, 0.0], 7, [9, 9, 9]) == [3, 2, 2]


def test_who_has_no_weight_gets_what_nobody_else_can_take() -> None:
    assert shared([1.0, 0.0, 0.0], 4, [9, 9, 9]) == [4, 0, 0]
    assert shared([1.0, 0.0, 0.0], 4, [2, 9, 9]) == [2, 1, 1]


def test_a_total_out_of_reach_is_met_as_nearly_as_bounds_allow() -> None:
    assert shared([1.0, 2.0], 99, [3, 4]) == [3, 4]
    assert shared([1.0, 2.0], 0, [3, 4], [1, 1]) == [1, 1]
    assert shared([1.0, 2.0], 5, [0, 0]) == [0, 0]


@given(st.integers(0, 999))
def test_every_row_is_dealt_out_by_itself(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(3, 2, 5, generator=generator)
    most = torch.randint(0, 9, (3, 2, 5), generator=generator)
    total = torch.randint(0, 20, (3, 2), generator=generator)

    def rows(x: Tensor) -> Tensor:
        return x.flatten(0, 1)

    each = [dealt(*row) for row in zip(rows(weights), rows(total), rows(most))]
    assert torch.equal(rows(dealt(weights, total, most)), torch.stack(each))
