"""HiPrune: attention received in two encoder layers; anchors, buffers and registers with the released code's border."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.budget import Budget
from foveate.methods.before_llm.hiprune import anchors_and_buffers, hierarchical
from foveate.ops.attention import columns
from foveate.ops.select import top_k
from tests.vectors import Case


def check_scores(case: Case) -> None:
    if "attn_mid" not in case:
        pytest.skip("the case gives scores, no attention")
    for layer in ("mid", "out"):
        assert_close(_received(case, layer), case[f"score_{layer}"], atol=1e-5, rtol=0)


def check_budget(case: Case) -> None:
    if "ratio" in case:
        assert Budget(case["ratio"]).of(_scores(case)[0].shape[1]) == case["budget_rounded"]
    for k, _, _ in _published(case):
        assert round(case["alpha"] * k / 5) == case.get("n_anchor", round(case["alpha"] * k / 5))


def check_anchors_and_buffers(case: Case) -> None:
    middle, _ = _scores(case)
    for k, first, _ in _published(case):
        mask = anchors_and_buffers(middle, case["grid_w"], round(case["alpha"] * k / 5), "clamp")

        assert [row.nonzero().flatten().tolist() for row in mask] == [row[row >= 0].tolist() for row in first]


def check_selection(case: Case) -> None:
    middle, output = _scores(case)
    for k, _, keep in _published(case):
        if keep.shape[1] < k:
            pytest.skip(
                f"defect of the published code: subtracting 1 does not exclude anchors and buffers from column sums, so it "
                f"keeps {keep.shape[1]} tokens of a budget of {k}"
            )
        kept = hierarchical(middle, output, case["grid_w"], k, case["alpha"], "clamp")

        assert kept.tolist() == keep.tolist()


def check_masking_fills_the_budget_with_anchors_and_buffers_in_it(case: Case) -> None:
    middle, output = _scores(case)
    for k, first, _ in _published(case):
        kept = hierarchical(middle, output, case["grid_w"], k, case["alpha"], "clamp")

        for ours, theirs in zip(kept.tolist(), first.tolist()):
            assert len(set(ours)) == k
            assert {cell for cell in theirs if cell >= 0} <= set(ours)


def check_intersecting_drops_what_clamping_folds_to_the_corners(case: Case) -> None:
    middle, _ = _scores(case)
    width, last = case["grid_w"], middle.shape[1] - 1
    for k, first, _ in _published(case):
        count = round(case["alpha"] * k / 5)
        inside = anchors_and_buffers(middle, width, count, "intersect")

        for mask, anchors, clamped in zip(inside, top_k(middle, count), first):
            folded = {0} if any(anchor < width for anchor in anchors) else set()
            folded |= {last} if any(anchor > last - width for anchor in anchors) else set()
            assert set(mask.nonzero().flatten().tolist()) | folded == set(clamped[clamped >= 0].tolist())


def _received(case: Case, layer: str) -> Tensor:
    """Attention received as the engine computes it, from queries and keys that have the given map."""
    attention = case[f"attn_{layer}"]
    attention = attention if attention.ndim == 4 else attention[None]
    logits = attention.clamp(min=torch.finfo(attention.dtype).tiny).log()
    key = torch.eye(logits.shape[-1]).expand_as(logits)
    received = columns(logits, key, 1.0)
    if "window_index" not in case:
        return received[:, 1:]
    # By patch in window order, as a sum over queries: four patches to a token.
    tokens = (received[0] * logits.shape[-1]).reshape(-1, 4).mean(1)
    return torch.empty_like(tokens).scatter(0, case["window_index"], tokens)


def _scores(case: Case) -> tuple[Tensor, Tensor]:
    return torch.atleast_2d(case["score_mid"]), torch.atleast_2d(case["score_out"])


def _published(case: Case) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Budget of an image, its anchors and buffers ``[I, *]`` (-1 = padding), and what was kept ``[I, *]``."""
    if "budgets" in case:
        for k in case["budgets"].tolist():
            yield k, case[f"anchor_buffer_{k}"][None], case[f"keep_{k}"][None]
    else:
        k = case["budget_rounded"] if "budget_rounded" in case else case["budget"] // len(case["score_mid"])
        yield k, torch.atleast_2d(case["anchor_buffer"]), torch.atleast_2d(case["keep"])
