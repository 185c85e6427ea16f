"""FOLDER: the fold loop of the LLaVA version, that of the simplified one, and a single matching."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.methods.in_encoder.folder import folded, scaled
from foveate.ops.matching import averaging, bipartite
from tests.vectors import Case


def check_tokens(case: Case) -> None:
    tokens, size = _merged(case)

    assert_close(tokens, case["tokens"], atol=1e-5, rtol=1e-5)
    assert torch.equal(size, case["size"])


def check_what_is_compared_is_merged_likewise(case: Case) -> None:
    if "metric_out" not in case:
        pytest.skip("the case does not tell what is compared in the end")
    ones = torch.ones(case["x"].shape[:2])
    reduction = averaging(*_folded(case), ones)

    assert_close(reduction.apply(_metric(case)), case["metric_out"], atol=1e-5, rtol=1e-5)


def check_one_matching_does_what_a_single_fold_does(case: Case) -> None:
    if "attn_out" not in case:
        pytest.skip("the case does not tell the attention in the end")
    ones, count = torch.ones(case["x"].shape[:2]), len(case["x"])
    penalty = case["alpha"] * 30 * case["attn_cls"]
    assignment, anchor = bipartite(
        case["metric"],
        (case["r"],) * count,
        (case["x"].shape[1],) * count,
        protected=case["class_token"],
        penalty=penalty,
        order="raster",
    )
    total = torch.zeros(anchor.shape).scatter_add(1, assignment, case["attn_cls"])

    assert_close(averaging(assignment, anchor, ones).apply(case["x"]), case["tokens"], atol=1e-5, rtol=1e-5)
    assert_close(total, case["attn_out"], atol=1e-5, rtol=1e-5)


def _merged(case: Case) -> tuple[Tensor, Tensor]:
    ones = torch.ones(case["x"].shape[:2])
    reduction = averaging(*_folded(case), ones)
    if case["variant"] == "simple":
        batch, rows, _ = case["x"].shape
        reduction = scaled(reduction, ones, (case["r"],) * batch, (rows,) * batch)
    return reduction.apply(case["x"]), reduction.mass(ones)


def _folded(case: Case) -> tuple[Tensor, Tensor]:
    batch, rows, _ = case["x"].shape
    options: dict[str, Any] = {"order": "raster", "protected": case.get("class_token", 1)}
    if case["variant"] == "match":
        options |= {"attention": case["attn_cls"], "strength": case["alpha"] * 30, "merge_attention": "sum"}
    if case["variant"] == "llava":
        options |= {"attention": case["attn_cls_heads"].mean(1), "strength": case["alpha"] * 100, "order": "grouped"}
    return folded(_metric(case), torch.ones(batch, rows), (case["r"],) * batch, (rows,) * batch, **options)


def _metric(case: Case) -> Tensor:
    metric: Tensor = case["keys"].mean(1) if "keys" in case else case.get("metric", case["x"])
    return metric
