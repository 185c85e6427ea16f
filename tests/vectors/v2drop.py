"""V2Drop: how far each token moved, and who stays after each of three stages."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Hidden, Site
from foveate.core.state import State
from foveate.methods import V2Drop
from foveate.methods.in_llm.v2drop import variation
from tests.vectors import Case

LAYERS = (3, 17, 22)


def check_variation(case: Case) -> None:
    for number, before in enumerate(_layouts(case)[:-1], start=1):
        moved = variation(case[f"in_prev{number}"][before.origin], case[f"in_cur{number}"][before.origin])

        assert_close(moved[before.ordinal >= 0], case[f"out_v{number}"], atol=3e-6, rtol=0)


def check_survivors(case: Case) -> None:
    for number, after in enumerate(_layouts(case)[1:], start=1):
        assert after.ordinal[after.ordinal >= 0].tolist() == case[f"out_kept{number}"].tolist()
        assert after.positions[0, 0].tolist() == case[f"out_position_ids{number}"].tolist()


def _layouts(case: Case) -> list[Layout]:
    """Before the first stage, and after each."""
    start, count, rows = case["cfg_image_start"], case["cfg_num_image"], len(case["in_cur1"])
    visual = torch.zeros(1, rows, dtype=torch.bool)
    visual[:, start : start + count] = True
    positions = torch.arange(rows)[None, None]
    layouts = [Layout.build(visual, torch.ones_like(visual), positions, [[Item(1, count, 0)]])]
    method = V2Drop(layers=LAYERS, ratios=(case["cfg_ratio1"], case["cfg_ratio2"], case["cfg_ratio3"]))
    for number, layer in enumerate(LAYERS, start=1):
        before = layouts[-1]
        seen = {Hidden(Site("decoder", layer - 1)): case[f"in_prev{number}"][before.origin]}
        edit = method.edit(Site("decoder", layer), case[f"in_cur{number}"][before.origin], before, seen, State())
        layouts.append(before.after(edit or Edit(Reduction.keeping(before.valid))))
    return layouts
