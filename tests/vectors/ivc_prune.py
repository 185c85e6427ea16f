"""IVC-Prune: means of the rotary tables, value similarities, and both ways to put the sets together."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import Function, KeyValue, Site
from foveate.core.state import State
from foveate.methods import IVCPrune
from foveate.methods.in_llm.ivc_prune import anchors, foreground, rotary_means
from foveate.ops.select import top_k
from tests.methods.llama import rotate
from tests.vectors import Case


def check_rotary_means(case: Case) -> None:
    cos, sin = _image_means(case)

    assert_close(cos[0].float(), case["out_cos_mean"], atol=2e-6, rtol=0)
    assert_close(sin[0].float(), case["out_sin_mean"], atol=2e-6, rtol=0)


def check_anchors(case: Case) -> None:
    share = 0.05 if case["cfg_mode"] else 0.1
    mask = anchors(*_image_means(case), round(share * case["cfg_num_image"]))

    assert mask[0].nonzero().flatten().tolist() == case["out_ivc"].tolist()


def check_foreground(case: Case) -> None:
    layout, count = _layout(case), case["cfg_num_image"]
    image = layout.where([(0, 0)])
    # Two tokens behind the image are not yet the question.
    question = torch.arange(case["cfg_image_start"] + count + 2, layout.shape[1])[None]
    keys = layout.valid if case["cfg_mode"] else layout.ordinal >= 0
    asked, seeds, like = foreground(case["in_values"][None], keys, image, question, max(1, round(0.01 * count)))

    assert_close(asked[0], case["out_seed_score"], atol=2e-6, rtol=0)
    assert seeds[0].sort().values.tolist() == case["out_seeds"].sort().values.tolist()
    assert_close(like[0], case["out_context_score"], atol=2e-6, rtol=0)
    if "out_context_top" in case:
        assert top_k(like, round(0.2 * count))[0].sort().values.tolist() == case["out_context_top"].tolist()


def check_survivors(case: Case) -> None:
    layout, values = _layout(case), case["in_values"][None]
    seen = {KeyValue(Site("decoder", 15)): (torch.zeros_like(values), values), Function("rotate", 16): _rotate(case)}
    method = IVCPrune(layer=16, mode="union" if case["cfg_mode"] else "fixed")
    edit = method.edit(Site("decoder", 16), torch.zeros(*layout.shape, 1), layout, seen, State())
    after = layout.after(edit or Edit(Reduction.keeping(layout.valid)))

    assert after.ordinal[after.ordinal >= 0].tolist() == case["out_kept"].tolist()
    assert after.origin[0].tolist() == case["out_keep_absolute"].tolist()
    assert torch.equal(after.positions[:, 0], case["in_position_ids"][:, after.origin[0]])


def _rotate(case: Case) -> functools.partial[Tensor]:
    return functools.partial(rotate, base=1e4 if case["cfg_mode"] else 1e6)


def _image_means(case: Case) -> tuple[Tensor, Tensor]:
    layout = _layout(case)
    cos, sin = rotary_means(_rotate(case), layout.positions, case["in_cos"].shape[-1])
    return cos[:, layout.ordinal[0] >= 0], sin[:, layout.ordinal[0] >= 0]


def _layout(case: Case) -> Layout:
    start, count = case["cfg_image_start"], case["cfg_num_image"]
    visual = torch.zeros(1, case["in_values"].shape[1], dtype=torch.bool)
    visual[:, start : start + count] = True
    positions = case["in_position_ids"][:, None]
    return Layout.build(visual, torch.ones_like(visual), positions, [[Item(1, count, 0)]])
