"""PyramidDrop: score and survivors of one stage boundary.

Scores of training (several query rows) are not implemented; the published code pads on the right, we on the left.
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
from foveate.methods import PyramidDrop
from foveate.ops.attention import from_rows
from tests.methods.llama import QueryKey, query_key
from tests.vectors import Case

LAYER = 8


def check_scores(case: Case) -> None:
    before = _layout(case)
    scores = from_rows(*_layer(case)(case["in_hidden"], before), before.last, before.prompt[:, None])
    for sample, start in enumerate(case["in_image_start"].tolist()):
        if start >= 0:
            assert_close(scores[sample][before.ordinal[sample] >= 0], case[f"out_score{sample}"], atol=1e-6, rtol=0)


def check_survivors(case: Case) -> None:
    before = _layout(case)
    method = PyramidDrop(layers=(LAYER,), ratios=(case["cfg_ratio_next"],))
    seen = {Function("query_key", LAYER): _layer(case)}
    edit = method.edit(Site("decoder", LAYER), case["in_hidden"], before, seen, State())
    after = before.after(edit or Edit(Reduction.keeping(before.valid)))
    for sample, start in enumerate(case["in_image_start"].tolist()):
        valid = after.valid[sample]
        if start >= 0:
            ordinal = after.ordinal[sample]
            assert ordinal[ordinal >= 0].tolist() == case[f"out_kept{sample}"].tolist()
        theirs = case["out_position_ids"][sample][case["out_attention_mask"][sample].bool()]
        assert after.positions[0, sample, valid].tolist() == theirs.tolist()


def _layer(case: Case) -> QueryKey:
    weights = (case["in_norm"], case["in_wq"], case["in_wk"])
    return query_key(*weights, heads=case["cfg_heads"], eps=case["cfg_rms_eps"], base=case["cfg_rope_base"])


def _layout(case: Case) -> Layout:
    if case["cfg_training"]:
        pytest.skip("the score of training, averaged over several query rows, is not implemented")
    valid = case["in_attention_mask"].bool()
    visual, items = torch.zeros_like(valid), []
    for sample, (start, total) in enumerate(zip(case["in_image_start"].tolist(), case["in_image_tokens"].tolist())):
        there = int(total * case["cfg_ratio_now"])
        if start >= 0:
            visual[sample, start : start + there] = True
        items.append([Item(1, total, 0)] if start >= 0 else [])
    # The ledger knows how many there were, the case holds those that are left.
    now = [[Item(1, int(item.count * case["cfg_ratio_now"]), 0) for item in sample] for sample in items]
    positions = (valid.long().cumsum(1) - 1).clamp(min=0)
    layout = Layout.build(visual, valid, positions[None], now)
    object.__setattr__(layout, "items", tuple(map(tuple, items)))
    return layout
