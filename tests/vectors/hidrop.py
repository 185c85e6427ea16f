"""HiDrop: the score of a filtering layer, and its selection.

The soft mask of the released top-k operator plays no part at inference and is not implemented.
"""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Function, Site
from foveate.core.state import State
from foveate.methods import HiDrop
from foveate.ops.attention import from_rows
from foveate.ops.select import top_k
from tests.methods.llama import QueryKey, query_key
from tests.vectors import Case


def check_scores(case: Case) -> None:
    before = _layout(case)
    scores = from_rows(*_layer(case)(case["in_hidden"][None], before), before.last, before.valid[:, None])

    assert_close(scores[before.ordinal >= 0], case["out_score"], atol=1e-6, rtol=0)


def check_survivors(case: Case) -> None:
    before = _layout(case)
    method = HiDrop(late_entry=1, layer_list=(10,), keep_list=(case["cfg_keep"],), early_exit=0)
    seen = {Function("query_key", 10): _layer(case)}
    edit = method.edit(Site("decoder", 10), case["in_hidden"][None], before, seen, State())
    after = before.after(edit or Edit(Reduction.keeping(before.valid)))

    assert after.ordinal[after.ordinal >= 0].tolist() == case["out_kept"].tolist()
    assert after.positions[0, 0].tolist() == case["out_position_ids"].tolist()


def check_top_k(case: Case) -> None:
    if len(case["out_op_kept"]) > case["cfg_op_k"]:
        pytest.skip("defect: the released operator keeps more than k where scores are tied across the boundary")

    assert top_k(case["in_op_scores"], case["cfg_op_k"]).sort().values.tolist() == case["out_op_kept"].tolist()


def check_top_k_of_a_batch(case: Case) -> None:
    assert top_k(case["in_op_scores2d"], case["cfg_op_k"]).sort().values.tolist() == case["out_op_kept2d"].tolist()


def _layer(case: Case) -> QueryKey:
    weights = (case["in_norm"], case["in_wq"], case["in_wk"])
    return query_key(*weights, heads=case["cfg_heads"], eps=case["cfg_rms_eps"], base=case["cfg_rope_base"])


def _layout(case: Case) -> Layout:
    start, count, rows = case["cfg_image_start"], case["cfg_num_image"], len(case["in_hidden"])
    visual = torch.zeros(1, rows, dtype=torch.bool)
    visual[:, start : start + count] = True
    return Layout.build(visual, torch.ones_like(visual), case["in_position_ids"][None, None], [[Item(1, count, 0)]])
