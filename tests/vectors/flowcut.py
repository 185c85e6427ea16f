"""FlowCut: what flows to each token, how many go, and an encoder that prunes in every second block."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.methods.in_encoder.flowcut import entropy_ratios, flow, looked_at, pruned, value_norms
from foveate.ops.select import top_k, top_rows
from tests.vectors import Case


def check_scores(case: Case) -> None:
    _only(case, "score")
    likeness = _likeness(case["v"])

    assert_close(case["attn_cls"].mean(1)[:, 1:], case["cls_attn"], rtol=1e-5, atol=0)
    assert_close(likeness, case["semantic"], rtol=1e-5, atol=0)
    assert_close(value_norms(case["v"])[:, 1:], case["value_norm"], rtol=1e-5, atol=0)
    assert_close(flow(case["cls_attn"], case["value_norm"], likeness), case["score"], rtol=1e-5, atol=0)


def check_counts(case: Case) -> None:
    if "rpl_target" not in case:
        pytest.skip("the case is of a whole stage")
    attention = case["cls_attn"] if case["variant"] == "score" else case["attn"][None]
    ratios = _ratios(attention)
    found = [[pruned(attention.shape[1], target, left, r) for r in ratios] for left, target in case["rpl_target"].tolist()]

    assert [of[0] for of in found] == case["prune_num_first" if case["variant"] == "score" else "prune_num"].tolist()
    if case["variant"] == "score":  # the code drops as many of each sample of a batch as of the one that loses most
        assert list(map(max, found)) == case["prune_num_batch"].tolist()


def check_an_encoder(case: Case) -> None:
    _only(case, "encoder")
    layers, batch, _, rows, _ = case["k"].shape
    kept, score, counts, first = torch.arange(rows - 1).expand(batch, -1), None, [], None
    for layer in range(layers - 1):
        left = layers - 3 - layer
        if left >= 0 and kept.shape[1] > case["target"]:
            attention, flows = _block(case, layer, kept)
            score = flows if score is None else 0.5 * score + 0.5 * flows
            if left % 2 == 0:
                # As many of each sample as of the one that loses most, which our counts are those of a sample alone of.
                n = max(pruned(kept.shape[1], case["target"], left, ratio) for ratio in _ratios(attention))
                kept, score = _drop(kept, score, n)
        counts.append(kept.shape[1])
        if not layer:
            assert_close(score, case["score_after_layer0"], rtol=1e-5, atol=0)
        if first is None and kept.shape[1] < rows - 1:
            first = layer
            assert kept.tolist() == case["keep_after_first_cut"].tolist()

    assert first == case["first_cut_layer"]
    assert [*counts, counts[-1]] == case["counts"].tolist()
    assert kept.tolist() == case["keep"].tolist()
    assert_close(score, case["final_cumulative"], rtol=1e-5, atol=0)


def check_the_second_stage(case: Case) -> None:
    _only(case, "llm", "qwen_llm")
    every, scale = torch.ones(1, case["k"].shape[1], dtype=torch.bool), case["k"].shape[2] ** -0.5
    relation = looked_at(case["q_last"][None], case["k"][None], every, scale)
    semantic = looked_at(case["v_last"][None], case["v"][None], every, scale)
    score = flow(relation, value_norms(case["v"][None]), semantic)

    assert_close(relation[0], case["relation"], rtol=1e-5, atol=0)
    assert_close(semantic[0], case["semantic"], rtol=1e-5, atol=0)
    assert_close(score[0], case["score"], rtol=1e-5, atol=0)
    assert top_k(score, case["target"])[0].sort().values.tolist() == case["keep"].tolist()


def check_an_encoder_without_cls(case: Case) -> None:
    _only(case, "qwen_vit")
    query, key, value = (case[name][None] for name in "qkv")
    every = torch.ones(1, key.shape[2], dtype=torch.bool)
    attention = looked_at(query.mean(2, keepdim=True), key, every, key.shape[3] ** -0.5)

    assert_close(attention[0], case["attn"], rtol=1e-5, atol=0)
    assert_close(flow(attention, value_norms(value))[0], case["score"], rtol=1e-5, atol=0)


def _only(case: Case, *variants: str) -> None:
    if case["variant"] not in variants:
        pytest.skip(f"the case is of {case['variant']}")


def _likeness(values: Tensor) -> Tensor:
    every = torch.ones(values.shape[0], values.shape[2], dtype=torch.bool)
    return looked_at(values[:, :, :1], values, every, 1.0)[:, 1:]


def _ratios(attention: Tensor) -> Sequence[float]:
    return entropy_ratios(attention, torch.ones_like(attention, dtype=torch.bool)).tolist()


def _block(case: Case, layer: int, kept: Tensor) -> tuple[Tensor, Tensor]:
    """Attention and flow of the patches ``kept`` ``[B, n]`` in a block."""
    rows = torch.cat([torch.zeros_like(kept[:, :1]), 1 + kept], dim=1)[:, None, :, None]
    key, value = (case[name][layer].gather(2, rows.expand(-1, case["k"].shape[2], -1, case["k"].shape[4])) for name in "kv")
    every = torch.ones(rows.shape[0], rows.shape[2], dtype=torch.bool)
    attention = looked_at(case["q_cls"][layer], key, every, key.shape[3] ** -0.5)[:, 1:]
    return attention, flow(attention, value_norms(value)[:, 1:], _likeness(value))


def _drop(kept: Tensor, score: Tensor, n: int) -> tuple[Tensor, Tensor]:
    stays = kept.shape[1] - n
    rows = top_rows(score, torch.ones_like(score, dtype=torch.bool), [stays] * len(score))
    return kept[rows].reshape(-1, stays), score[rows].reshape(-1, stays)
