"""Prune2Drive: a rate for each view, views of different size side by side."""

from __future__ import annotations

import torch

from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import Prune2Drive
from tests.methods.bodiless import layout, traits

LAYER = Site("decoder", 1)


def kept(method: Prune2Drive, *prompts: str) -> list[list[int]]:
    rows = layout(*prompts)
    x = torch.randn(*rows.shape, 8, generator=torch.Generator().manual_seed(0))
    edit = method.edit(LAYER, x, rows, {}, State())
    assert edit is not None
    return [[row for row in sample if row >= 0] for sample in edit.reduction.anchor.tolist()]


def test_each_view_has_its_rate_and_those_beyond_have_keep() -> None:
    (rows,) = kept(Prune2Drive(keep=0.25, rates=(1.0, 0.5)), "t1111222233334444t")

    assert [sum(start <= row < start + 4 for row in rows) for start in (1, 5, 9, 13)] == [4, 2, 1, 1]
    assert {0, 17} <= set(rows)


def test_no_view_disappears() -> None:
    (rows,) = kept(Prune2Drive(rates=(0.0, 0.1)), "t1111222t")

    assert [sum(start <= row < end for row in rows) for start, end in ((1, 5), (5, 8))] == [1, 1]


def test_a_view_gets_in_a_batch_what_it_gets_alone() -> None:
    both = kept(Prune2Drive(keep=2), "t111111t", ".t22223t")
    alone = kept(Prune2Drive(keep=2), "t111111t")

    assert both[0] == alone[0]
    assert [len(rows) for rows in both] == [4, 5]


def test_rates_of_one_change_nothing() -> None:
    rows = layout("t1122t")

    assert Prune2Drive(rates=(1.0, 1.0)).edit(LAYER, torch.randn(1, 6, 4), rows, {}, State()) is None


def test_it_may_act_before_the_language_model() -> None:
    assert Prune2Drive(layer=0).sites(traits()) == (Site("sequence"),)
    assert "rates=(0.5, 2): must be" in _refusal()


def _refusal() -> str:
    try:
        Prune2Drive(rates=(0.5, 2))
    except ValueError as error:
        return str(error)
    return ""
