"""PruMerge and PruMerge+: CLS attention, the adaptive count, the choice, and the merge of what was chosen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.reduction import Reduction
from foveate.methods.before_llm.prumerge import cls_attention, merging, outliers, published_grid
from foveate.ops.select import top_k
from tests.vectors import Case


def check_attention(case: Case) -> None:
    assert_close(cls_attention(case["q"], case["k"], 1), case["cls_attn"], atol=1e-6, rtol=0)


def check_adaptive_count(case: Case) -> None:
    if not case["adaptive"]:
        pytest.skip("the ratio is given")
    # The published code counts over all samples of a batch at once; we do so only here.
    joint = case["cls_attn"].reshape(1, -1)

    assert outliers(joint, torch.ones_like(joint).bool()).item() == round(case["ratio_used"] * joint.shape[1])


def check_the_best_come_first(case: Case) -> None:
    count = _count(case)

    assert top_k(case["cls_attn"], count).tolist() == case["idx"][:, :count].tolist()


def check_choice(case: Case) -> None:
    kept, _ = _chosen(case)
    rest = [(~row).nonzero().flatten().tolist() for row in kept]

    assert rest == case["complement"].tolist()
    assert _merging(case).anchor[:, :-1].tolist() == case["idx"].tolist()


def check_tokens(case: Case) -> None:
    tokens = _merging(case).apply(case["hidden"][:, 1:])

    assert_close(tokens, case["tokens"], atol=1e-5 * case["tokens"].abs().max().item(), rtol=0)


def _count(case: Case) -> int:
    return int(case["cls_attn"].shape[1] * case["ratio_used"])


def _chosen(case: Case) -> tuple[Tensor, Tensor]:
    """Tokens that stay ``[B, N]``, and numbers that put them in order."""
    if any(len(set(row)) < len(row) for row in case["idx"].tolist()):
        pytest.skip(
            "defect of the published code: non-adaptive PruMerge+ keeps tokens twice that are both outliers and on its "
            "grid, and loses as many others from the rest"
        )
    attention, count = case["cls_attn"], _count(case)
    rank = top_k(attention, attention.shape[1]).argsort(1)
    kept = rank < count
    if case["plus"]:
        kept = kept | published_grid(torch.ones_like(kept), torch.full((len(kept),), count))
    place = torch.arange(attention.shape[1])
    return kept, torch.where(rank < count, rank, attention.shape[1] + place)


def _merging(case: Case) -> Reduction:
    kept, order = _chosen(case)
    counts = [count + 1 for count in kept.sum(1).tolist()]
    valid = torch.ones_like(kept)
    return merging(case["cls_attn"], case["k"][:, 1:], order, kept, valid, counts, neighbours=case["n_neighbours"])
