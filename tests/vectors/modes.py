"""MoDES: what is skipped, what the experts then make, both forms of a skipped layer, and the search."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextExperts

from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.core.signal import Ids, Numbers, Seen
from foveate.core.state import State
from foveate.engine.experts import weighed
from foveate.methods import MoDES
from foveate.methods.in_llm.modes import frontier
from tests.vectors import Case

WORD, SPECIAL = 5, 1
CLOSE = dict(atol=1e-4, rtol=0)
NEVER = (0.0, 0.0)


def check_skipped(case: Case) -> None:
    weights, index = _router(case)
    kept = _weigh(case, weights, index, _thresholds(case))
    there = case["padding_mask"] == 0
    dense = torch.zeros(*weights.shape[:2], case["router_weight"].shape[0]).scatter(2, index, kept)

    assert torch.equal(index[there], case["out_router_indices"])
    assert_close(dense[there], case["out_router_weights"], **CLOSE)
    assert int(((kept == 0) & there[..., None]).sum()) == case["out_skipped"]
    assert int(there.sum()) * case["top_k"] == case["out_total"]


def check_output(case: Case) -> None:
    weights, index = _router(case)
    made = _run(case, index, _weigh(case, weights, index, _thresholds(case)), echo=False)
    there = case["padding_mask"] == 0  # the code gives padding its input back, which nobody reads

    assert_close(made[there], case["out_y"][there], **CLOSE)


def check_layer_skipped_for_text(case: Case) -> None:
    _check_layer(case, (math.inf, 0.0), "text")


def check_layer_skipped_for_vision(case: Case) -> None:
    _check_layer(case, (0.0, math.inf), "vision")


def check_search(case: Case) -> None:
    skips, losses = case["skip_table"], case["loss_table"]
    best, tried = frontier(
        lambda row, column: (skips[row, column].item(), losses[row, column].item()), *skips.shape, case["target"]
    )

    assert list(best) == case["out_best_index"].tolist()
    assert [list(cell) for cell in tried] == case["out_evaluated"].tolist()
    if best[0] >= 0:
        assert tried[best][1] == case["out_best_loss"]


def _check_layer(case: Case, thresholds: tuple[float, float], kind: str) -> None:
    weights, index = _router(case)
    kept = _weigh(case, weights, index, thresholds)
    echoed, nothing = (_run(case, index, kept, echo=echo) for echo in (True, False))

    assert_close(echoed, case[f"out_y_layer_skip_{kind}"], **CLOSE)
    of_kind = case[f"{kind}_mask"].bool() & (case["padding_mask"] == 0)
    assert torch.equal(nothing[of_kind], torch.zeros_like(nothing[of_kind]))
    assert torch.equal(nothing[~of_kind], echoed[~of_kind])


def _thresholds(case: Case) -> tuple[float, float]:
    return case["tau_text"], case["tau_vision"]


def _router(case: Case) -> tuple[Tensor, Tensor]:
    """Weights and numbers ``[B, S, K]`` of the experts chosen, as transformers' routers choose."""
    shares = (case["hidden_states"] @ case["router_weight"].T).softmax(-1)
    weights, index = shares.topk(case["top_k"])
    return weights / weights.sum(-1, keepdim=True), index


def _weigh(case: Case, weights: Tensor, index: Tensor, thresholds: tuple[float, float]) -> Tensor:
    vision, valid = case["vision_mask"].bool(), case["padding_mask"] == 0
    counts = (vision & valid).sum(1).tolist()
    positions = torch.arange(vision.shape[1]).expand(1, *vision.shape)
    layout = Layout.build(vision & valid, valid, positions, [[Item(1, n, 0)] if n else [] for n in counts])
    numbers = {
        "factors": torch.tensor([[case["alpha_text"], case["alpha_vision"]]]),
        "thresholds": list(thresholds),
        "special": torch.tensor([SPECIAL]),
    }
    seen: Seen = {Ids(): torch.where(case["text_mask"].bool(), WORD, SPECIAL), Numbers("modes"): numbers}
    return MoDES().weigh(0, weights, index, layout, seen, State())


def _run(case: Case, index: Tensor, weights: Tensor, *, echo: bool) -> Tensor:
    x = case["hidden_states"]
    experts, width, twice = case["gate_up_proj"].shape
    config = Qwen3VLMoeTextConfig(
        hidden_size=width, moe_intermediate_size=twice // 2, num_experts=experts, num_experts_per_tok=case["top_k"]
    )
    config._experts_implementation = "eager"
    module = Qwen3VLMoeTextExperts(config)
    module.gate_up_proj.data.copy_(case["gate_up_proj"].transpose(1, 2))
    module.down_proj.data.copy_(case["down_proj"].transpose(1, 2))
    with torch.no_grad():
        flat = (part.flatten(0, 1) for part in (x, index, weights))
        return weighed(lambda *_: weights.flatten(0, 1), echo, module, *flat).reshape(x.shape)
