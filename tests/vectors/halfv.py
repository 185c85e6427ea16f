"""HalfV: what both stages of the Qwen path see and keep, and the fill alone (the matrix entropy is not the method's)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Hidden, Seen, Site
from foveate.core.state import State
from foveate.methods import HalfV
from foveate.methods.in_llm.halfv import attended
from foveate.ops.farthest import farthest_first
from tests.vectors import Case

IVR, SSR = 2, 21
CLOSE: dict[str, Any] = dict(atol=1e-6, rtol=0)


def check_scores(case: Case) -> None:
    layout = _layout(case)
    visual = layout.rows(*VISUAL)
    query, key = _query_key(case, "a")(case["in_hidden_a"][None], layout, rope=False)

    assert_close(attended(query, key, layout.last, visual)[visual], case["out_ivr_score"], **CLOSE)

    layout, _ = _stage(case, layout, "a")
    visual = layout.rows(*VISUAL)
    query, key = _query_key(case, "b")(case["in_hidden_b"][None, layout.origin[0]], layout)

    assert_close(attended(query, key, layout.last, visual)[visual], case["out_ssr_score"], **CLOSE)


def check_stages(case: Case) -> None:
    layout, images = _stage(case, _layout(case), "a")

    assert images == case["out_ivr_kept"].tolist()
    assert layout.origin[0].tolist() == case["out_ivr_position_ids"].tolist()
    assert torch.equal(layout.positions[:, 0], case["in_position_ids"][:, layout.origin[0]])

    layout, images = _stage(case, layout, "b")

    assert images == case["out_ssr_kept"].tolist()
    assert layout.origin[0].tolist() == case["out_ssr_position_ids"].tolist()


def check_fill(case: Case) -> None:
    x, k, seeds = case["in_op_feats"][None], case["cfg_op_k"], case["in_op_seeds"]
    none = torch.zeros(x.shape[:2], dtype=torch.bool)
    more = farthest_first(x, k - len(seeds), taken=none.scatter(1, seeds[None], True))[0]

    assert sorted([*seeds.tolist(), *more.tolist()]) == case["out_op_fill"].tolist()
    assert sorted(farthest_first(x, k, taken=none)[0].tolist()) == case["out_op_fill_noseed"].tolist()


def _layout(case: Case) -> Layout:
    place = torch.arange(len(case["in_hidden_a"]))
    visual = (place >= case["cfg_image_start"]) & (place < case["cfg_image_start"] + case["cfg_num_image"])
    items = [[Item(1, case["cfg_num_image"], 0)]]
    return Layout.build(visual[None], torch.ones_like(visual)[None], case["in_position_ids"][:, None], items)


def _stage(case: Case, layout: Layout, stage: str) -> tuple[Layout, list[int]]:
    """The layout behind a stage, and the image tokens that are left."""
    method = HalfV(
        ivr_layer=IVR,
        ivr_ratio=case["cfg_ivr_ratio"],
        attention=case["cfg_attention_ratio"],
        ssr_layer=SSR,
        ssr="prune",
        ssr_ratio=case["cfg_ssr_ratio"],
    )
    layer, there = IVR if stage == "a" else SSR, layout.origin[0]
    seen: Seen = {
        Hidden(Site("decoder", layer - 1)): case[f"in_hidden_{stage}"][None, there],
        Function("query_key", layer - 1): _query_key(case, stage),
        Function("norm"): lambda x: _normed(x, case["in_norm_final"], case["cfg_rms_eps"]),
    }
    edit = method.edit(Site("decoder", layer), case["in_output_a"][None, there], layout, seen, State())
    layout = layout if edit is None else layout.after(edit)
    return layout, layout.ordinals()[0][0].tolist()


def _normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight


def _query_key(case: Case, stage: str) -> Any:
    width = case["in_hidden_a"].shape[1] // case["cfg_heads"]
    sections = case["cfg_mrope_section"].tolist() * 2
    rotary = [
        torch.cat([part[number % 3] for number, part in enumerate(case[name].split(sections, dim=-1))], dim=-1)
        for name in ("in_cos", "in_sin")
    ]

    def function(x: Tensor, layout: Layout, rope: bool = True) -> tuple[Tensor, Tensor]:
        normed = _normed(x, case[f"in_norm_{stage}"], case["cfg_rms_eps"])
        made = []
        for name in ("q", "k"):
            rows = torch.nn.functional.linear(normed, case[f"in_w{name}_{stage}"], case[f"in_b{name}_{stage}"])
            heads = rows.reshape(*rows.shape[:2], -1, width).transpose(1, 2)
            cos, sin = (table[layout.origin[0]] for table in rotary)
            turned = torch.cat([-heads[..., width // 2 :], heads[..., : width // 2]], dim=-1)
            made.append(heads * cos + turned * sin if rope else heads)
        return made[0], made[1]

    return function
