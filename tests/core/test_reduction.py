"""A reduction is a linear map: it applies, composes and can be read; padding stays padding."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from foveate.core.reduction import Reduction
from tests.core.strategies import gathers, masks, merges, reductions, subsets, values
from tests.suite.test_memory import Live

Data = st.DataObject


@given(masks(), st.data())
def test_applying_a_composition_is_applying_one_after_the_other(alive: Tensor, data: Data) -> None:
    first = data.draw(reductions(alive))
    second = data.draw(reductions(first.valid))
    x = data.draw(values((*alive.shape, 2), alive))

    assert torch.equal((second @ first).apply(x), second.apply(first.apply(x)))


@given(masks(), st.data())
def test_composition_is_associative(alive: Tensor, data: Data) -> None:
    first = data.draw(reductions(alive))
    second = data.draw(reductions(first.valid))
    third = data.draw(reductions(second.valid))
    left, right = (third @ second) @ first, third @ (second @ first)

    assert torch.equal(left.matrix(), right.matrix())
    assert torch.equal(left.anchor, right.anchor)


@given(masks(), st.data())
def test_anchors_of_a_composition_are_the_anchors_of_the_anchors(alive: Tensor, data: Data) -> None:
    first = data.draw(reductions(alive))
    second = data.draw(reductions(first.valid))
    number = torch.arange(alive.shape[1]).expand_as(alive)
    both = second @ first

    assert torch.equal(both.valid, second.valid)
    assert torch.equal(both.take(number)[both.valid], second.take(first.take(number))[second.valid])


@given(masks(), st.data())
def test_applying_is_multiplying_by_the_matrix(alive: Tensor, data: Data) -> None:
    reduction = data.draw(reductions(alive))
    x = data.draw(values((*alive.shape, 3), alive))

    assert torch.equal(reduction.apply(x), reduction.matrix() @ x)


@given(masks(), st.data())
def test_what_was_read_as_a_matrix_can_be_made_again(alive: Tensor, data: Data) -> None:
    reduction = data.draw(reductions(alive))
    again = Reduction.dense(reduction.matrix(), reduction.anchor)

    assert torch.equal(again.matrix(), reduction.matrix())
    assert torch.equal(again.members(), reduction.members())


@given(masks(), st.data())
def test_trailing_dimensions_are_mapped_alike(alive: Tensor, data: Data) -> None:
    reduction = data.draw(reductions(alive))
    x = data.draw(values((*alive.shape, 2, 2), alive))
    flat = reduction.apply(x.flatten(2))

    assert torch.equal(reduction.apply(x), flat.reshape(*flat.shape[:2], 2, 2))
    assert torch.equal(reduction.apply(x[:, :, 0, 0]), flat[..., 0])


@given(masks(), st.data())
def test_padding_rows_come_out_zero(alive: Tensor, data: Data) -> None:
    reduction = data.draw(reductions(alive))
    out = reduction.apply(data.draw(values((*alive.shape, 2), alive)) + 1)

    assert not out[~reduction.valid].any()


@given(masks(), st.data())
def test_merging_conserves_the_mass_of_what_is_not_dropped(alive: Tensor, data: Data) -> None:
    reduction = data.draw(reductions(alive))
    size = data.draw(values(tuple(alive.shape), alive)).abs()
    used = reduction.members().any(1)

    torch.testing.assert_close(reduction.mass(size).sum(1), (size * used).sum(1))


@given(masks(), st.data())
def test_a_merged_row_stands_for_its_members(alive: Tensor, data: Data) -> None:
    reduction = data.draw(merges(alive))

    assert torch.equal(reduction.mass(alive.float()), reduction.members().sum(2).float())


@given(masks(), st.data())
def test_rows_of_a_gather_keep_the_mass_that_they_had(alive: Tensor, data: Data) -> None:
    reduction = data.draw(gathers(alive))
    size = data.draw(values(tuple(alive.shape), alive)).abs()

    assert torch.equal(reduction.mass(size)[reduction.valid], reduction.take(size)[reduction.valid])


def test_a_repeated_row_shares_its_mass() -> None:
    repeated = Reduction.gather(torch.tensor([[0, 0]]), inputs=1)

    assert repeated.mass(torch.ones(1, 1)).tolist() == [[0.5, 0.5]]


@given(masks(), st.data(), st.booleans())
def test_keeping_keeps_order_and_pads_on_the_left(alive: Tensor, data: Data, counted: bool) -> None:
    keep = data.draw(subsets(alive))
    counts = tuple(keep.sum(1).tolist())
    reduction = Reduction.keeping(keep, counts if counted else None)
    rows = [mask.nonzero().flatten().tolist() for mask in keep]

    assert reduction.anchor.tolist() == [[-1] * (max(counts) - len(sample)) + sample for sample in rows]


def test_keeping_nothing_leaves_no_row() -> None:
    assert Reduction.keeping(torch.zeros(2, 3, dtype=torch.bool)).shape == (2, 0, 3)


def test_keeping_nothing_can_be_applied() -> None:
    nothing = Reduction.keeping(torch.zeros(2, 3, dtype=torch.bool))

    assert nothing.apply(torch.ones(2, 3, 4)).shape == (2, 0, 4)


def test_merging_by_hand() -> None:
    # rows 0 and 2 into output 0, row 3 into output 1, row 1 dropped
    merge = Reduction.merging(
        torch.tensor([[0, -1, 0, 1]]), torch.tensor([[0.5, 1.0, 0.5, 2.0]]), anchor=torch.tensor([[2, 3]])
    )

    assert merge.apply(torch.tensor([[2.0, 9.0, 4.0, 5.0]])).tolist() == [[3.0, 10.0]]
    assert merge.mass(torch.ones(1, 4)).tolist() == [[2.0, 1.0]]
    assert merge.take(torch.arange(4)[None]).tolist() == [[2, 3]]


@st.composite
def sums(draw: st.DrawFn) -> tuple[Reduction, Tensor]:
    """Any number of entries in any order, repeated and dropped ones among them, with real weights; and rows for them."""
    batch, rows, inputs, entries = (draw(st.integers(least, most)) for least, most in ((1, 3), (0, 4), (1, 5), (0, 40)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    sample = torch.randint(batch, (entries,), generator=generator)
    row = torch.randint(rows + 1, (entries,), generator=generator)
    target = torch.where(row < rows, sample * rows + row, batch * rows)
    source = sample * inputs + torch.randint(inputs, (entries,), generator=generator)
    weight = torch.randn(entries, generator=generator, dtype=torch.float64)
    anchor = torch.randint(-1, inputs, (batch, rows), generator=generator)
    tail = draw(st.sampled_from([(), (1,), (3,), (0,), (2, 3)]))
    x = torch.randn(batch, inputs, *tail, generator=generator, dtype=torch.float64)
    return Reduction(inputs, anchor, (target, source, weight)), x


@given(sums(), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_sums_of_any_entries_are_those_of_the_matrix(drawn: tuple[Reduction, Tensor], kind: torch.dtype) -> None:
    reduction, x = drawn
    x = x.to(kind)
    flat = x.double().reshape(*x.shape[:2], x.shape[2:].numel())
    out = reduction.apply(x)

    assert out.dtype == kind
    expected = (reduction.matrix() @ flat).reshape(out.shape)
    torch.testing.assert_close(out, expected.to(kind))


def test_many_joins_need_no_copy_of_a_row_for_each() -> None:
    join = Reduction.dense(torch.rand(1, 50, 100), torch.arange(50)[None])
    x = torch.randn(1, 100, 256)
    with Live() as live:
        join.apply(x)

    assert live.peak < 2 * x.untyped_storage().nbytes()


def test_a_row_without_a_number_spoils_only_what_it_joins() -> None:
    join = Reduction.dense(torch.tensor([[[1.0, 0.0, 2.0], [0.0, 1.0, 3.0]]]), torch.tensor([[0, 1]]))

    assert join.apply(torch.tensor([[[torch.nan], [1.0], [1.0]]]))[0, 1].item() == 4.0


def test_gradients_reach_rows_and_weights() -> None:
    weight, x = torch.rand(1, 3, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, 2, dtype=torch.float64)
    assignment, anchor = torch.tensor([[0, 1, 0]]), torch.tensor([[0, 1]])

    def sums(weight: Tensor, x: Tensor) -> Tensor:
        return Reduction.merging(assignment, weight, anchor).apply(x)

    assert torch.autograd.gradcheck(sums, (weight, x.requires_grad_()))


def test_sums_in_half_precision_are_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    assignment, weight = torch.arange(60)[None] % 4, torch.rand(1, 60, generator=generator)
    merge = Reduction.merging(assignment, weight, torch.arange(4)[None])
    x = torch.randn(1, 60, 8, generator=generator).bfloat16()

    assert torch.equal(merge.apply(x), merge.apply(x.float()).bfloat16())


def test_a_dropped_row_touches_no_other_sample() -> None:
    merge = Reduction.merging(torch.tensor([[0, 0], [0, -1]]), torch.ones(2, 2), anchor=torch.tensor([[0], [0]]))
    x = torch.tensor([[[1.0], [1.0]], [[1.0], [torch.nan]]])

    assert merge.apply(x).flatten().tolist() == [2.0, 1.0]


def test_reductions_that_do_not_fit_are_not_composed() -> None:
    first, second = (Reduction.gather(torch.tensor([[0, 1]]), inputs) for inputs in (4, 3))

    with pytest.raises(ValueError, match=r"first gives .* rows, second takes 3"):
        second @ first


def test_each_row_goes_where_most_of_it_goes_and_anchors_to_their_own() -> None:
    merged = Reduction.dense(torch.tensor([[[1.0, 0.0, 0.2, 0.9], [0.0, 0.0, 0.7, 0.3]]]), torch.tensor([[0, 3]]))
    gathered = Reduction.gather(torch.tensor([[-1, 2, 0]]), inputs=4)

    assert merged.goes().tolist() == [[0, -1, 1, 1]]
    assert gathered.goes().tolist() == [[2, -1, 1, -1]]
