"""Prune2Drive: the order of selection in each view, and what is kept of the sequence."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Site
from foveate.core.state import State
from foveate.methods import Prune2Drive
from foveate.ops.farthest import farthest_first
from tests.vectors import Case


def check_order(case: Case) -> None:
    views = torch.stack([case["hidden_states"][start : start + case["tokens_per_view"]] for start in case["view_start"]])
    order = farthest_first(views, int(case["out_k"].max()))
    chosen = [view[:count] for view, count in zip(order, case["out_k"].tolist())]

    assert torch.cat(chosen).tolist() == case["out_order"].tolist()


def check_kept(case: Case) -> None:
    x, count = case["hidden_states"][None], case["tokens_per_view"]
    visual = torch.zeros(x.shape[:2], dtype=torch.bool)
    for start in case["view_start"]:
        visual[:, start : start + count] = True
    positions = torch.arange(x.shape[1])[None, None]
    items = [[Item(1, count, source) for source in range(len(case["view_start"]))]]
    layout = Layout.build(visual, torch.ones_like(visual), positions, items)
    method = Prune2Drive(rates=tuple(case["rate"].tolist()))
    edit = method.edit(Site("decoder", 1), x, layout, {}, State())
    assert edit is not None

    assert edit.reduction.anchor[0].tolist() == case["out_keep_positions"].tolist()
    assert layout.after(edit).positions[0, 0].tolist() == case["out_keep_positions"].tolist()
    assert_close(edit.reduction.apply(x)[0], case["out_hidden_kept"], rtol=0, atol=0)
