"""TransPrune: transitions, attention of the question, and two cuts with transitions added up before and between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Halves, Site
from foveate.core.state import State
from foveate.methods import TransPrune
from foveate.methods.in_llm.transprune import SUM, question_scores, share, transition
from tests.methods.llama import QueryKey, query_key
from tests.vectors import Case

STAGES = {2: 1, 3: 2}
"""Stage behind each layer: transitions of layers 1 and 2 come before the first, those of layer 3 before the second."""


def check_transitions(case: Case) -> None:
    for layer, (before, _, _) in _flow(case).items():
        halves = _halves(case, layer, before)
        value = sum(transition(x, y, before.valid) for x, y in halves)

        assert_close(value[0], case[f"out_T{layer}"], atol=2e-6, rtol=0)


def check_scores(case: Case) -> None:
    for layer, (before, _, varied) in _flow(case).items():
        if layer not in STAGES:
            continue
        stage, visual = STAGES[layer], before.rows(*VISUAL)
        query, key = _layer(case, stage)(case[f"in_hidden{stage}"][before.origin], before)
        ttv = share(varied, visual)[visual]
        iga = share(question_scores(query, key, before.question_rows, before.valid), visual)[visual]

        assert_close(ttv, case[f"out_ttv{stage}"], atol=2e-6, rtol=0)
        assert_close(iga, case[f"out_iga{stage}"], atol=2e-6, rtol=0)
        assert_close(ttv + iga, case[f"out_score{stage}"], atol=4e-6, rtol=0)


def check_survivors(case: Case) -> None:
    for layer, (_, after, _) in _flow(case).items():
        if layer in STAGES:
            stage = STAGES[layer]
            assert after.ordinal[after.ordinal >= 0].tolist() == case[f"out_kept{stage}"].tolist()
            assert after.positions[0, 0].tolist() == case[f"out_position_ids{stage}"].tolist()


def _flow(case: Case) -> dict[int, tuple[Layout, Layout, Tensor]]:
    """Layouts before and after the edit behind each layer, and the transitions so far that it saw."""
    start, count, rows = case["cfg_image_start"], case["cfg_num_image"], len(case["in_hidden1"])
    visual = torch.zeros(1, rows, dtype=torch.bool)
    visual[:, start : start + count] = True
    layout = Layout.build(visual, torch.ones_like(visual), torch.arange(rows)[None, None], [[Item(1, count, 0)]])
    ratios = (case["cfg_ratio1"], case["cfg_ratio2"])
    method, state = TransPrune(layers=(2, 3), ratios=ratios, accumulate=(1, 2, 3)), State()
    flow = {}
    for layer in (1, 2, 3):
        stage = STAGES.get(layer, 1)
        seen: dict[Any, Any] = {Halves(Site("decoder", layer - 1)): _halves(case, layer, layout)}
        seen[Function("query_key", layer)] = _layer(case, stage)
        hidden = case[f"in_hidden{stage}"][layout.origin]
        edit = method.edit(Site("decoder", layer), hidden, layout, seen, state)
        edit = edit or Edit(Reduction.keeping(layout.valid))
        flow[layer] = (layout, layout.after(edit), state.get("prefill", SUM))
        layout = layout.after(edit)
        state.compact(edit.reduction)
    return flow


def _halves(case: Case, layer: int, layout: Layout) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple(
        (case[f"in_{half}_x{layer}"][layout.origin], case[f"in_{half}_y{layer}"][layout.origin]) for half in ("attn", "mlp")
    )


def _layer(case: Case, stage: int) -> QueryKey:
    weights = (case[f"in_norm{stage}"], case[f"in_wq{stage}"], case[f"in_wk{stage}"])
    return query_key(*weights, heads=case["cfg_heads"], eps=case["cfg_rms_eps"], base=case["cfg_rope_base"])
