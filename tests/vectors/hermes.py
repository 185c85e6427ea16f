"""HERMES: attention to the video, entries that stay, turned keys and folded entries, with the released code's constants."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.bounded import Held
from foveate.methods import Hermes
from foveate.methods.kv_cache.hermes import depths
from tests.vectors import Case


def check_attention(case: Case) -> None:
    prefix = case["cfg_prefix_len"]
    for layer, (held, (kind, _)) in enumerate(zip(_held(case), _depths(case))):
        if kind != "shallow":
            found = held.attention[kind == "middle"][prefix:]
            assert_close(found, case["out_visual_attn"][layer, : len(found)], atol=1e-6, rtol=0)


def check_what_stays(case: Case) -> None:
    left = _method(case).retain(_held(case), _turner(case), case["cfg_max_position_embeddings"])

    compacts = bool((case["in_positions"].max() > case["cfg_max_position_embeddings"] - 1024).item())
    for layer, held in enumerate(left):
        count = int(case["out_lengths"][layer])
        assert held.keys.shape[2] == count
        assert held.positions[0].tolist() == case["out_positions"][layer, :count].tolist()
        tolerance = 1e-5 if compacts else 1e-6
        assert_close(held.keys[0], case["out_key"][layer, :, :count], atol=tolerance, rtol=0)
        assert_close(held.values[0], case["out_value"][layer, :, :count], atol=1e-6, rtol=0)


def _method(case: Case) -> Hermes:
    return Hermes(
        keep=case["cfg_budget"], recency=1.0, fading=0.9, shallow=case["cfg_short_ratio"], deep=case["cfg_long_ratio"]
    )


def _depths(case: Case) -> list[tuple[str, float]]:
    return depths(len(case["cfg_lengths"]), case["cfg_short_ratio"], case["cfg_long_ratio"])  # type: ignore[return-value]


def _held(case: Case) -> list[Held]:
    found = []
    for layer, count in enumerate(case["cfg_lengths"].tolist()):
        attention = []
        for name in ("in_attn_global", "in_attn_mixed"):
            attention.append(case[name][layer].mean((0, 1))[:count])
        keys, values = (case[name][layer, None, :, :count] for name in ("in_key", "in_value"))
        positions = case["in_positions"][layer, None, :count]
        found.append(Held(keys, values, positions, case["cfg_prefix_len"], tuple(attention)))
    return found


def _turner(case: Case):  # type: ignore[no-untyped-def]
    width = case["in_key"].shape[-1]
    frequency = case["cfg_rope_base"] ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)

    def turned(layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        angle = ((new - old)[0, :, None] * frequency).repeat(1, 2)
        half = torch.cat([-keys[..., width // 2 :], keys[..., : width // 2]], dim=-1)
        return (keys * angle.cos() + half * angle.sin()).to(keys.dtype)

    return turned
