"""Blink: the card's worked example and limiting cases."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.roles import Item, Role
from foveate.methods.in_llm.blink import finer, most_salient, regions, with_finer
from tests import tiny
from tests.suite.bodies import BODIES, ONE, RAGGED

SALIENCY = torch.tensor([[0.1, 0.1, 0, 0], [0.1, 0.5, 0.1, 0], [0, 0, 0, 0.1], [0, 0, 0, 0]])


def pictures(*items: Item, after: int = 2) -> Layout:
    """A prompt of one word, pictures, and so many words."""
    visual = torch.zeros(1, 1 + sum(item.count for item in items) + after, dtype=torch.bool)
    visual[:, 1 : visual.shape[1] - after] = True
    positions = torch.arange(visual.shape[1])[None, None]
    return Layout.build(visual, torch.ones_like(visual), positions, [items])


def test_the_worked_example() -> None:
    region, _, totals = regions(pictures(Item(4, 4, 0), after=0), 2)
    best, share = most_salient(SALIENCY.flatten()[None], region[:, 1:], totals[0])

    assert (best.tolist(), totals) == ([0], (4,))
    assert_close(share, torch.tensor([0.8]))


def test_evenly_spread_attention_gives_every_region_its_share() -> None:
    region, _, totals = regions(pictures(Item(4, 6, 0), Item(2, 4, 1), after=0), 2)
    _, share = most_salient(torch.ones(1, 32), region[:, 1:], totals[0])

    assert totals == (8,)
    assert_close(share, torch.tensor([1 / 8]))
    assert region[0, 1:].bincount().tolist() == [4] * 8


def test_regions_end_with_the_grid_and_with_the_frame() -> None:
    region, cell, totals = regions(pictures(Item(6, 3, 0, frames=2), after=1), 2)

    assert totals == (8,)
    assert region[0, 1:19].reshape(6, 3).tolist() == [[0, 0, 1], [0, 0, 1], [2, 2, 3], [4, 4, 5], [4, 4, 5], [6, 6, 7]]
    assert cell[0, 1:10].reshape(3, 3).tolist() == [[0, 1, 0], [2, 3, 2], [0, 1, 0]]
    assert region[0, [0, 19]].tolist() == [-1, -1]


@pytest.mark.parametrize(("side", "scale"), [(4, 2), (3, 3), (2, 1), (1, 2)])
def test_finer_rows_are_interpolated_bilinearly(side: int, scale: int) -> None:
    x = torch.randn(side**2, 5, generator=torch.Generator().manual_seed(0))
    _, weight = finer(side, scale)
    grid = x.T.reshape(1, 5, side, side)
    wanted = torch.nn.functional.interpolate(grid, scale_factor=scale, mode="bilinear", align_corners=False)

    assert_close(weight / weight.sum(1, keepdim=True) @ x, wanted[0].flatten(1).T)


def test_finer_rows_come_behind_their_picture_without_what_is_not_there() -> None:
    layout = pictures(Item(2, 2, 0), Item(1, 2, 1))
    reduction, inserted = with_finer(layout, layout.valid, torch.tensor([[1, -1, 3, 4]]), 9 + 3, 2, 1)

    assert reduction.anchor.tolist() == [[0, 1, 2, 3, 4, 1, 3, 4, 5, 6, 7, 8]]
    assert inserted[0].nonzero()[:, 0].tolist() == [5, 6, 7]
    assert torch.equal(reduction.matrix()[0].argmax(1), reduction.anchor[0])


def live(session: Any) -> list[list[int]]:
    """Rows of each sample that enter each layer, and leave the last."""
    return [list(layout.live) for layout in session.trace.log[-1]]


@torch.no_grad()
@pytest.mark.parametrize("name", ["llava-clip", "qwen3_vl"])
def test_rows_come_in_the_band_and_leave_behind_it(name: str) -> None:
    body = BODIES[name]
    inputs, model = body.inputs(RAGGED), body.model()
    whole = inputs["attention_mask"].sum(1).tolist()
    with foveate.attach(model, "blink(band=(1, 2), region=2, expand=0.0, drop=0.0)") as session:
        model(**inputs)

    grown = [rows + 16 for rows in whole]  # wherever something is attended to, one region of four tokens is the first
    assert live(session)[:4] == [whole, grown, grown, whole]
    assert live(session)[4:] == [whole] * len(live(session)[4:])
    assert session.report.flops > session.report.flops_unmodified
    assert [len(kept) for of in session.trace.alive(2) for kept in of] == [16] * 4


@torch.no_grad()
def test_a_prompt_that_ends_in_its_picture_still_does() -> None:
    body = BODIES["llava-clip"]
    inputs = body.inputs(ONE)
    end = int((inputs["input_ids"] == tiny.IMAGE).nonzero()[-1, 1]) + 1
    inputs |= {key: inputs[key][:, :end] for key in ("input_ids", "attention_mask")}
    model = body.model()
    with foveate.attach(model, "blink(band=(1, 3), region=2, expand=0.0, drop=0.0)") as session:
        model(**inputs)
    layout = session.trace.log[-1][2]

    assert layout.role[0, -1] == Role.IMAGE
    assert layout.role[0, -17:-1].tolist() == [Role.INSERTED] * 16
    assert session.trace.log[-1][4].role[0, -1] == Role.IMAGE


@torch.no_grad()
@pytest.mark.parametrize("other", ["hiprune(keep=9)", "snapkv(keep=0.5, window=4)", "fastv(layer=2, keep=6)"])
def test_it_goes_with_methods_that_drop_and_compress(other: str) -> None:
    body = BODIES["llava-clip"]
    inputs, model = body.inputs(RAGGED), body.model().double()
    inputs["pixel_values"] = inputs["pixel_values"].double()
    recipe = f"{other} + blink(band=(1, 2), region=2, expand=0.0, drop=0.0)"

    def answered(given: dict[str, Tensor]) -> Tensor:
        with foveate.attach(model, recipe):
            out = model.generate(
                **given, max_new_tokens=3, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        return torch.stack(out.logits, dim=1)

    alone = body.inputs(RAGGED, only=1)
    alone["pixel_values"] = alone["pixel_values"].double()
    assert_close(answered(alone)[0], answered(inputs)[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("other", ["shortv(layers=(1,))", "ivc_prune"])
def test_who_routes_rows_or_cuts_earlier_caches_is_refused_beside_it(other: str) -> None:
    with pytest.raises(FoveateError, match=rf"blink \+ {other.split('(')[0]}: blink puts rows in"):
        foveate.attach(BODIES["llava-clip"].model(), f"blink(band=(1, 2)) + {other}")


def test_windows_that_count_rows_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"blink: band=.*sliding attention"):
        foveate.attach(BODIES["gemma3"].model(), "blink(band=(1, 3))")


def test_thresholds_that_cross_are_refused() -> None:
    with pytest.raises(FoveateError, match=r"blink: drop=4.0: must be at most expand=3.0"):
        foveate.attach(BODIES["llava-clip"].model(), "blink(drop=4.0)")
