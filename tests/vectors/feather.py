"""FEATHER: scores without rotary positions over visual keys, and both cuts."""

from __future__ import annotations

import math

import torch
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Hidden, Site
from foveate.core.state import State
from foveate.methods import Feather
from foveate.methods.in_llm.feather import image_scores
from tests.methods.llama import QueryKey, query_key
from tests.vectors import Case

LAYERS = (8, 16)


def check_scores(case: Case) -> None:
    for number, before in enumerate(_layouts(case)[:-1], start=1):
        query, key = _layer(case, number)(case[f"in_hidden{number}"][before.origin], before, rope=False)
        scores = image_scores(query, key, before.last, before.rows(*VISUAL))

        assert_close(scores[before.ordinal >= 0], case[f"out_score{number}"], atol=2e-6, rtol=0)


def check_survivors(case: Case) -> None:
    for number, after in enumerate(_layouts(case)[1:], start=1):
        assert after.ordinal[after.ordinal >= 0].tolist() == case[f"out_kept{number}"].tolist()
        assert after.positions[0, 0].tolist() == case[f"out_position_ids{number}"].tolist()


def _layer(case: Case, number: int) -> QueryKey:
    names = (f"in_norm{number}", f"in_wq{number}", f"in_wk{number}")
    return query_key(*(case[name] for name in names), heads=case["cfg_heads"], eps=case["cfg_rms_eps"])


def _layouts(case: Case) -> list[Layout]:
    """Before the first cut, and after each."""
    start, count, rows = case["cfg_image_start"], case["cfg_num_image"], len(case["in_hidden1"])
    side = math.isqrt(count)
    visual = torch.zeros(1, rows, dtype=torch.bool)
    visual[:, start : start + count] = True
    positions = torch.arange(rows)[None, None]
    layouts = [Layout.build(visual, torch.ones_like(visual), positions, [[Item(side, side, 0)]])]
    method = Feather(kappa=1 - case["cfg_prune_ratio"], stride=case["cfg_stride"], layers=LAYERS)
    for number, layer in enumerate(LAYERS, start=1):
        before = layouts[-1]
        hidden = case[f"in_hidden{number}"][before.origin]
        seen = {
            Hidden(Site("decoder", layer - 1)): hidden,
            Function("query_key", layer - 1): _layer(case, number),
        }
        edit = method.edit(Site("decoder", layer), hidden, before, seen, State())
        layouts.append(before.after(edit or Edit(Reduction.keeping(before.valid))))
    return layouts
