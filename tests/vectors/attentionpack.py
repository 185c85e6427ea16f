"""AttentionPack: the factors, what is rebuilt of them at one rank and at two, and the running importance of entries."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.methods.kv_cache.attentionpack import first_importance
from foveate.ops.lowrank import Tiers, factorise, joint, moved, parted
from tests.vectors import Case


def check_singular_values(case: Case) -> None:
    left, _ = _factors(case)

    assert_close(left.norm(dim=1), case["out_S"], atol=5e-4 * case["out_S"].max().item(), rtol=0)


def check_rebuilt(case: Case) -> None:
    left, right = _factors(case)
    half, thin = (factor.half().float() for factor in (left, right))  # as the release stores them

    for rebuilt in (left @ right, half @ thin):
        assert_close(parted(rebuilt, _heads(case)), case["out_rebuilt"], atol=_atol(case), rtol=0)


def check_rebuilt_in_half(case: Case) -> None:
    left, right = (factor.half() for factor in _factors(case))

    assert_close(
        parted(left @ right, _heads(case)), case["out_rebuilt_half"], atol=_atol(case) * 4 / 3, rtol=0, check_dtype=False
    )


def check_rebuilt_at_two_ranks(case: Case) -> None:
    (left, right), tiers = _factors(case), _tiers(case)
    expected, weights = case["out_rebuilt_two_ranks"], case["in_states"].sum(3).softmax(-1)

    assert_close(parted(tiers.cut(left) @ right, _heads(case)), expected, atol=_atol(case), rtol=0)
    # What a step of decoding computes instead: the same sums, without the values.
    out = tiers.combine(weights, left) @ right
    assert_close(out, weights @ joint(expected), atol=_atol(case), rtol=0)


def check_rebuilt_head_by_head(case: Case) -> None:
    states = case["in_states"]
    left, right = factorise(states.flatten(0, 1), case["cfg_rank"])

    assert_close((left @ right).reshape(states.shape), case["out_rebuilt_per_head"], atol=_atol(case), rtol=0)


def check_importance_and_the_top_group(case: Case) -> None:
    importance = _first(case)
    for step, expected in enumerate(case["out_importance"]):
        if step:
            importance = moved(importance, _visual(case, step)[:, None], 0.5)
        assert_close(importance, expected, atol=1e-6, rtol=0)
        tiers = _tiers(case, importance)
        assert torch.equal(tiers.order[:, : case["cfg_top"]].sort(dim=1).values, case["out_top"][step])


def _heads(case: Case) -> int:
    return int(case["in_states"].shape[1])


def _atol(case: Case) -> float:
    return float(3e-3 * case["in_states"].abs().max())


def _factors(case: Case) -> tuple[Tensor, Tensor]:
    return factorise(joint(case["in_states"]), case["cfg_rank"], seed=case["cfg_seed"])


def _visual(case: Case, step: int) -> Tensor:
    """``[B, T]``: the mean over heads of the last query's attention to visual entries."""
    first, count = case["cfg_prefix_len"], case["in_states"].shape[2]
    return case["in_attention"][step, :, :, -1, first : first + count].mean(1)  # type: ignore[no-any-return]


def _first(case: Case) -> Tensor:
    batch, _, count, _ = case["in_states"].shape
    entries = torch.arange(count).expand(batch, -1) + case["cfg_prefix_len"]
    return first_importance(case["in_attention"][0, :, :, -1], entries)


def _tiers(case: Case, importance: Tensor | None = None) -> Tiers:
    """The release's, whose groups are those of the batch's first sample."""
    batch, _, count, _ = case["in_states"].shape
    if importance is None:
        importance = _first(case)[:1].expand(batch, -1)
    rank = min(case["cfg_rank"], case["out_U"].shape[2])
    share = case["cfg_top"] / count
    return Tiers.of((rank, min(case["cfg_rank_low"], rank)), (share, 1 - share), [count] * batch, importance, 0.5)
