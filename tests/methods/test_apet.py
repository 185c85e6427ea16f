"""ApET: the card's examples, limiting cases, both stages and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.methods import ApET
from foveate.methods.before_llm.apet import approximation_errors, compressed, edit_of
from foveate.ops.farthest import farthest_first
from tests.methods.bodiless import layout, traits
from tests.methods.vision import vision_layout

OPEN = frozenset({"pre_projector", "projected"})
ROWS = torch.tensor([[[4, 0], [0, 3], [2, 0.2], [0, 1], [1, 0]]])


def errors_of(x: torch.Tensor, basis: list[int], ridge: float = 1e-5) -> torch.Tensor:
    index = torch.tensor([basis])
    return approximation_errors(x, index, torch.ones_like(index).bool(), ridge)


def test_the_worked_example_of_errors() -> None:
    x = torch.tensor([[[1, 0, 0], [0, 1, 0], [3, 4, 0], [1, 1, 2], [0, 0, 0.5]]])

    assert_close(errors_of(x, [0, 1]), torch.tensor([[0, 0, 0, 2, 0.5]]), atol=1e-4, rtol=0)


def test_the_worked_example_of_the_basis() -> None:
    assert farthest_first(ROWS, 3, torch.tensor([0]), metric="euclidean").tolist() == [[0, 1, 4]]


@pytest.mark.parametrize("raster", [False, True])
def test_the_worked_example_of_merging(raster: bool) -> None:
    # The basis is a token of its own in the card; here it is one more, that joins nobody.
    x = torch.cat([ROWS, torch.ones(1, 1, 2)], dim=1)
    errors = torch.tensor([[4.0, 3, 2, 1, 0.5, 0]])
    valid = torch.ones(1, 6).bool()
    order, (joins, weight), (over, share) = compressed(x, valid, errors, torch.tensor([[5]]), [3], [1], raster=raster)

    assert order.tolist() == [[0, 1, 2]]
    assert joins[0, :5].tolist() == [0, 1, 2, 1, 0]
    assert weight[0, [1, 2, 3]].tolist() == [0.5, 0, 0.5]
    assert (over.tolist(), share.tolist()) == ([[2]], [[1]])


@given(st.integers(0, 999), st.floats(-3, 3))
def test_what_the_basis_spans_has_no_error_and_adding_it_changes_none(seed: int, factor: float) -> None:
    x = torch.randn(1, 12, 6, generator=torch.Generator().manual_seed(seed))
    spanned = torch.cat([x, factor * x[:, :1] - 2 * x[:, 4:5]], dim=1)
    moved = x.clone()
    moved[:, 7] += factor * x[:, 4]

    assert float(errors_of(spanned, [0, 4])[0, -1]) < 1e-3
    assert_close(errors_of(moved, [0, 4]), errors_of(x, [0, 4]), atol=1e-3, rtol=0)


def test_copies_in_the_basis_do_no_harm() -> None:
    x = 30 * torch.randn(1, 8, 64, generator=torch.Generator().manual_seed(0))
    x[:, 1] = x[:, 0]

    assert_close(errors_of(x, [0, 1]), errors_of(x, [0]), atol=1e-2, rtol=0)


@given(st.lists(st.integers(2, 20), min_size=1, max_size=3), st.integers(1, 20), st.integers(1, 6), st.booleans())
def test_each_image_keeps_its_budget_whatever_is_beside_it(counts: list[int], keep: int, basis: int, raster: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    prompt = vision_layout(counts, cls=False, gaps=[[1, 3], [2, 5], [4, 1]])
    x = torch.randn(*prompt.shape, 4, generator=generator)
    kept = [min(keep, n) for n in counts]
    edit = edit_of(x, prompt, kept, basis, raster=raster, blend=0.5)
    after, made = prompt.after(edit), edit.reduction.apply(x)

    assert after.valid.sum(1).tolist() == kept
    for image, count in enumerate(counts):
        alone = vision_layout([count], cls=False)
        mine = x[image : image + 1, prompt.valid[image]]
        one = edit_of(mine, alone, [kept[image]], basis, raster=raster, blend=0.5)
        assert after.ordinal[image, after.valid[image]].tolist() == alone.after(one).ordinal[0].tolist()
        assert_close(made[image, after.valid[image]], one.reduction.apply(mine)[0], atol=1e-4, rtol=1e-4)
        if kept[image] == count:
            assert torch.equal(one.reduction.apply(mine), mine)


def test_text_stays_as_it_is_and_all_pictures_of_a_prompt_are_one_pool() -> None:
    prompt = layout("t1111t2222t")
    x = torch.randn(1, 11, 4, generator=torch.Generator().manual_seed(0))
    edit = ApET(keep=4, basis=2).edit(Site("decoder", 16), x, prompt, {}, State())
    assert edit is not None
    after = prompt.after(edit)
    made = edit.reduction.apply(x)

    assert after.visual == (4,)
    assert torch.equal(made[after.role == 1], x[prompt.role == 1])
    assert after.positions.tolist() == [[list(range(7))]]


def test_published_settings() -> None:
    grid, prompt = vision_layout([576], cls=False), layout("t" + "1" * 576 + "t")
    model = traits(vision_sites=OPEN)
    method = ApET().fitted(model)
    first, second = method.sites(model)

    assert (first, second) == (Site("pre_projector"), Site("decoder", 16))
    assert (method.counts(first, grid), method.counts(second, prompt)) == ((96,), (32,))
    assert ApET(keep=0.1).counts(first, grid) == (172,)  # 0.3 of it, truncated
    assert ApET().fitted(traits(decoder_layers=28)).layer == 14
    assert ApET().sites(traits(vision_sites=frozenset({"projected"})))[0] == Site("projected")


@pytest.mark.parametrize(
    ("method", "model", "reason"),
    [
        (ApET(keep=10), traits(), "keep=10: must be more than basis=10"),
        (ApET(layer=32), traits(), "layer=32: must be in 1..31"),
        (ApET(positions="contiguous"), traits(rotary_rows=3), "multi-row"),
    ],
)
def test_what_cannot_be_is_refused_at_attach(method: ApET, model: Traits, reason: str) -> None:
    assert reason in str(method.check(model))


@pytest.mark.parametrize(
    "parameters", [{"keep": 0}, {"entering": 0.5}, {"basis": 0}, {"layer": 0}, {"ridge": -1.0}, {"blend": 2.0}]
)
def test_parameters_that_mean_nothing_are_refused_by_name(parameters: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=f"apet: {next(iter(parameters))}="):
        ApET(**parameters)
