"""FastV: the ranking by the last prompt token's row, and the three published ways to a budget."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Attention, Rows, Site
from foveate.core.state import State
from foveate.methods import FastV
from foveate.methods.in_llm.fastv import last_row_scores
from foveate.ops.select import top_k, top_rows
from tests.vectors import Case


def check_scores(case: Case) -> None:
    assert_close(_image_scores(case)[0], case["out_score"], atol=1e-6, rtol=0)


def check_ranking(case: Case) -> None:
    order = top_k(_image_scores(case), case["cfg_attention_rank"])[0] + case["cfg_image_start"]

    assert order.tolist() == case["out_top_order"].tolist()


def check_budget_as_a_count(case: Case) -> None:
    after, rows = _pruned(case, FastV(keep=case["cfg_attention_rank"]))

    assert after.origin[0].tolist() == case["out_keep"].tolist()
    assert after.positions[0].tolist() == case["out_position_ids"].tolist()
    assert torch.equal(rows[0], case["out_hidden"])


def check_budget_rounded_down(case: Case) -> None:
    method = FastV(keep=1 - case["cfg_drop_ratio"], rounding="floor")
    after, _ = _pruned(case, method)

    assert method.budget().of(case["cfg_num_image"]) == case["out_k_int"]
    assert after.origin[0].tolist() == case["out_keep_int"].tolist()


def check_budget_rounded(case: Case) -> None:
    method = FastV(keep=1 - case["cfg_drop_ratio"], rounding="round")
    after, _ = _pruned(case, method)

    assert method.budget().of(case["cfg_num_image"]) == case["out_k_round"]
    assert after.origin[0].tolist() == case["out_keep_round"].tolist()


def check_mask_variant(case: Case) -> None:
    layout, scores = _layout(case), last_row_scores(_attention(case))
    visual = layout.ordinal >= 0
    visible = ~visual | top_rows(scores, visual, (case["cfg_attention_rank"],))

    assert visible[0].long().tolist() == case["out_mask_variant"].tolist()


def _attention(case: Case) -> Attention:
    """The last row as the engine records it: the logarithm of a softmax is a set of logits whose log-sum-exp is 0."""
    row = case["in_attn"][None, :, -1:].log()
    return Attention(row, torch.zeros(row.shape[:-1]))


def _image_scores(case: Case) -> Tensor:
    start = case["cfg_image_start"]
    return last_row_scores(_attention(case))[:, start : start + case["cfg_num_image"]]


def _layout(case: Case) -> Layout:
    start, count, rows = case["cfg_image_start"], case["cfg_num_image"], len(case["in_hidden"])
    visual = torch.zeros(1, rows, dtype=torch.bool)
    visual[:, start : start + count] = True
    return Layout.build(visual, torch.ones_like(visual), torch.arange(rows)[None, None], [[Item(1, count, 0)]])


def _pruned(case: Case, method: FastV) -> tuple[Layout, Tensor]:
    layout, hidden = _layout(case), case["in_hidden"][None]
    observed = {Rows(Site("decoder", method.layer - 1)): _attention(case)}
    edit = method.edit(Site("decoder", method.layer), hidden, layout, observed, State())
    edit = edit or Edit(Reduction.keeping(layout.valid))
    return layout.after(edit), edit.reduction.apply(hidden)
