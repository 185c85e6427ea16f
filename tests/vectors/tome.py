"""ToMe: one merge, and encoders of several blocks that merge in each."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.reduction import Reduction
from foveate.ops.matching import averaging, bipartite
from tests.vectors import Case


def check_one_merge(case: Case) -> None:
    reduction = _match(case)

    assert_close(reduction.apply(case["x"]), case["tokens"], atol=1e-5, rtol=0)
    assert torch.equal(reduction.mass(case["size_in"]), case["size"])


def check_members(case: Case) -> None:
    reduction = _match(case)
    if case["distill_token"]:
        pytest.skip("defect of the published code: its unmerge misplaces tokens when there is a distillation token")
    merged = reduction.apply(case["x"])
    spread = (reduction.members().float().transpose(1, 2)) @ merged

    assert_close(spread, case["unmerged"], atol=1e-5, rtol=0)


def check_several_blocks(case: Case) -> None:
    if "r_list" not in case:
        pytest.skip("the case is a single merge")
    x, whole, size = _encode(case)

    assert_close(x, case["tokens"], atol=1e-4, rtol=0)
    if "size" in case:
        assert torch.equal(size, case["size"])
        assert torch.equal(whole.members().long(), case["source"])


def _match(case: Case) -> Reduction:
    if "metric" not in case:
        pytest.skip("the case is an encoder of several blocks")
    protected = case["class_token"] + case["distill_token"]
    return _merge(case["metric"], case["size_in"], case["r"], protected)


def _merge(metric: Tensor, size: Tensor, r: int, protected: int) -> Reduction:
    batch, rows, _ = metric.shape
    counts = (min(r, (rows - protected) // 2),) * batch
    order = "grouped" if protected else "similarity"
    return averaging(*bipartite(metric, counts, (rows,) * batch, protected=protected, order=order), size)


def _encode(case: Case) -> tuple[Tensor, Reduction, Tensor]:
    """The case's blocks of attention alone, with our merge behind each; the port to CLIP forgets sizes."""
    x, heads = case["x"], case["heads"]
    port = case["variant"] == "clip_port"
    size = torch.ones(x.shape[:2])
    whole = Reduction.gather(torch.arange(x.shape[1]).expand(len(x), -1), x.shape[1])
    for r in case["r_list"].tolist():
        query, key, value = (
            part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in (x @ case["w_qkv"].T + case["b_qkv"]).chunk(3, -1)
        )
        bias = size.log()[:, None, None] if case.get("prop_attn") else None
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        x = x + out.transpose(1, 2).flatten(2) @ case["w_proj"].T + case["b_proj"]
        weights = torch.ones_like(size) if port else size
        step = _merge(key.mean(1), weights, r, 1 if port else case["class_token"])
        x, size, whole = step.apply(x), step.mass(size), step @ whole
    return x, whole, size
