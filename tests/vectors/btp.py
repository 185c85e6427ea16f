"""BTP: the spatial set, the diverse and the balanced ones, and what the stages of both variants keep."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Attention, Rows, Seen, Site
from foveate.core.state import State
from foveate.methods import BTP
from foveate.methods.in_llm.btp import PRESETS, Mix, balanced, spread_cells
from foveate.ops.farthest import farthest_first
from tests.vectors import Case

LAYERS = (3, 6, 14)


def check_spatial_set(case: Case) -> None:
    rows, columns = case["cfg_grid"].tolist()

    assert list(spread_cells(rows, columns, rows * columns // 4)) == case["out_spatial"].tolist()


def check_diverse_ones(case: Case) -> None:
    x, k, seeds = case["in_op_feats"][None], case["cfg_op_k"], case["in_op_seeds"]
    taken = torch.zeros(x.shape[:2], dtype=torch.bool).scatter(1, seeds[None], True)
    more = farthest_first(x, k, taken=taken)[0]

    assert farthest_first(x, k)[0].tolist() == case["out_op_div"].tolist()
    assert [*seeds.tolist(), *more.tolist()] == case["out_op_div_seeded"].tolist()


def check_attended_ones(case: Case) -> None:
    scores = case["in_op_attn"].mean(0)[None]
    order = balanced(scores, torch.tensor([case["cfg_op_extra"]]), torch.tensor([case["cfg_op_thr"]]))

    assert order[0, : case["cfg_op_sel"]].tolist() == case["out_op_attn"].tolist()


def check_sets_of_a_stage(case: Case) -> None:
    slots = torch.arange(case["cfg_grid"].prod())
    for stage, mix in enumerate(PRESETS["llava"].mixes[:2], start=1):
        assert _sets(case, stage, mix, slots) == (case[f"out_div{stage}"].tolist(), case[f"out_attn{stage}"].tolist())
        slots = case[f"out_kept{stage}"]


def check_stages(case: Case) -> None:
    kept, positions = _stages(case, BTP(layers=LAYERS, ratios=(1 / 2, 1 / 2, 1 / 3)))

    assert kept == [case[f"out_kept{stage}"].tolist() for stage in (1, 2, 3)]
    assert positions == case["out_position_ids3"].tolist()


def check_stages_of_qwen(case: Case) -> None:
    kept, _ = _stages(case, BTP(layers=LAYERS, ratios=(1 / 2,) * 3, preset="qwen"))

    assert kept == [case[f"out_qwen_kept{stage}"].tolist() for stage in (1, 2, 3)]


def _sets(case: Case, stage: int, mix: Mix, slots: Tensor) -> tuple[list[int], list[int]]:
    k = len(slots) // 2
    diverse, attended, among = mix.counts(k)
    rows = slots + case["cfg_image_start"]
    order = balanced(case[f"in_logits{stage}"][:, rows].mean(0)[None], torch.tensor([among]), torch.tensor([k]))
    far = farthest_first(case[f"in_hidden{stage}"][rows][None], diverse)[0, :diverse]
    return far.tolist(), order[0, :attended].tolist()


def _stages(case: Case, method: BTP) -> tuple[list[list[int]], list[int]]:
    """Image tokens kept at each stage, and the positions of all rows at the end."""
    hidden, (rows, columns) = case["in_hidden1"], case["cfg_grid"].tolist()
    place = torch.arange(len(hidden))
    visual = (place >= case["cfg_image_start"]) & (place < case["cfg_image_start"] + rows * columns)
    layout = Layout.build(visual[None], torch.ones_like(visual)[None], place[None, None], [[Item(rows, columns, 0)]])
    kept = []
    for stage, layer in enumerate(LAYERS, start=1):
        there = layout.origin[0]
        logits = case[f"in_logits{stage}"][None, :, None, there]
        seen: Seen = {Rows(Site("decoder", layer - 1)): Attention(logits, logits.logsumexp(-1))}
        edit = method.edit(Site("decoder", layer), case[f"in_hidden{stage}"][None, there], layout, seen, State())
        assert edit is not None
        layout = layout.after(edit)
        kept.append(layout.ordinals()[0][0].tolist())
    return kept, layout.positions[0, 0].tolist()
