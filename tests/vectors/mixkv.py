"""MixKV: the host's score, the keys' geometry, and the entries kept under each host; its ablations from their parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.signal import Attention, Numbers, Rows, Site
from foveate.methods import MixKV
from foveate.methods.kv_cache.entries import best_entries
from foveate.methods.kv_cache.mixkv import key_geometry, rescaled
from foveate.ops.attention import row_logits
from tests.vectors import Case


def check_host_score(case: Case) -> None:
    if case["cfg_budget"] >= case["in_key"].shape[2]:
        pytest.skip("the budget holds the whole prompt, which is not scored then")

    assert_close(_score(case)[0][..., : -case["cfg_window"]], case["out_host_score"], atol=1e-6, rtol=1e-5)


def check_key_geometry(case: Case) -> None:
    similarity, redundancy = key_geometry(case["in_key"], _layout(case).valid)

    assert_close(similarity[..., : -case["cfg_window"]], case["out_key_sim"], atol=1e-6, rtol=1e-5)
    assert_close(redundancy, case["out_online_redundancy"].clamp(0, 1), atol=1e-6, rtol=1e-5)


def check_kept_with_the_table(case: Case) -> None:
    assert _kept(case) == _sorted(case["out_snap_headwisemixkv_kept"])


def check_kept_with_the_prompts_own_redundancy(case: Case) -> None:
    assert _kept(case, redundancy="online") == _sorted(case["out_snap_online_kept"])


def check_kept_under_pyramidkv(case: Case) -> None:
    kept = _kept(case, host="pyramidkv")

    assert {len(head) for head in kept} == {case["out_pyramid_budget"]}
    assert kept == _sorted(case["out_pyramid_kept"])


def check_kept_under_adakv(case: Case) -> None:
    kept = _kept(case, host="adakv")

    assert [len(head) for head in kept] == case["out_ada_head_lens"].tolist()
    assert kept == _sorted(case["out_ada_kept"])


def check_kept_by_some_of_the_parts(case: Case) -> None:
    rows, window = case["in_key"].shape[2], case["cfg_window"]
    among = (torch.arange(rows) < rows - window)[None]
    host = torch.nn.functional.pad(case["out_host_score"], (0, window))
    norms = case["in_value"].norm(dim=-1)
    different = -key_geometry(case["in_key"], _layout(case).valid)[0]
    parts = {
        "attn": host,
        "vnorm": host + rescaled(norms, host, among),
        "keydiff": different,
        "mixkv": host + rescaled(norms, host, among) + rescaled(different, host, among),
    }
    for name, score in parts.items():
        if f"out_snap_{name}_kept" in case:
            kept = best_entries(score.masked_fill(~among, float("inf")), among | ~among, [case["cfg_budget"]])
            assert kept[0].tolist() == _sorted(case[f"out_snap_{name}_kept"]), name


def _method(case: Case, **changed: Any) -> MixKV:
    settings: dict[str, Any] = dict(
        keep=case["cfg_budget"],
        window=case["cfg_window"],
        kernel=case["cfg_kernel"],
        pooling={"avgpool": "average", "maxpool": "max"}[case["cfg_pooling"]],
        beta=case["cfg_pyram_beta"],
        floor=case["cfg_ada_floor"],
        normalise=bool(case["cfg_ada_normalize"]),
        redundancy="table",
    )
    return MixKV(**(settings | changed))


def _layout(case: Case) -> Layout:
    rows = case["in_key"].shape[2]
    text = torch.zeros(1, rows, dtype=torch.bool)
    return Layout.build(text, ~text, torch.arange(rows)[None, None], [[]])


def _score(case: Case, **changed: Any) -> Tensor | None:
    method, layer = _method(case, **changed), case["cfg_layer_idx"]
    query, rows = case["in_query"], case["in_key"].shape[2]
    last = torch.arange(rows - case["cfg_window"], rows)
    logits = row_logits(query[:, :, last], case["in_key"], query.shape[-1] ** -0.5)
    logits = logits.masked_fill(torch.arange(rows) > last[:, None], float("-inf"))
    seen = {
        Rows(Site("decoder", layer), method.window, keys="cache"): Attention(logits, logits.logsumexp(-1)),
        Numbers("mixkv"): {"redundancy": case["in_redundancy_table"]},
    }
    return method.score(layer, case["in_key"], case["in_value"], seen, _layout(case))


def _kept(case: Case, **changed: Any) -> list[list[int]]:
    """Entries of each head in the case's layer; all layers have the same scores."""
    layers = case["cfg_num_layers"]
    plan = _method(case, **changed).plan([_score(case, **changed)] * layers, [_layout(case)] * layers)
    kept = plan[case["cfg_layer_idx"]]
    if kept is None:
        return [list(range(case["in_key"].shape[2]))] * case["in_key"].shape[1]
    assert isinstance(kept, Kept)
    return [[entry for entry in head if entry >= 0] for head in kept.entries[0].tolist()]


def _sorted(published: Tensor) -> list[list[int]]:
    return [sorted(entry for entry in head if entry >= 0) for head in published.tolist()]
