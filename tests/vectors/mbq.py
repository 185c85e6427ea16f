"""MBQ's fork: its searches for scales with and without weighing by modality (AWQ), and SmoothQuant's scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.engine.trial import Trial
from foveate.methods.weights.awq import mean_size
from foveate.methods.weights.mbq import row_weights
from foveate.ops.grid import Grid, spans
from foveate.ops.scaling import Found, equalising, search, smoothing
from tests.blocks import GROUPS, NAMES, trial
from tests.vectors import Case


def check_inputs(case: Case) -> None:
    block = _block(case)
    assert block.groups == tuple(GROUPS.values())
    for group, names in GROUPS.items():
        if f"out_{group}_x" in case:
            (rows,) = block.exact(names[0])
            assert_close(rows.x.view_as(case[f"out_{group}_x"]), case[f"out_{group}_x"], atol=1e-5, rtol=1e-4)


def check_who_feeds_whom(case: Case) -> None:
    block = _block(case)
    feeders = {name: block.feeder(NAMES[name]) for name in NAMES}

    assert feeders["down"] == NAMES["up"]
    assert feeders["o"] == (NAMES["v"] if case["num_heads"] == case["num_kv_heads"] else None)
    assert not any(feeders[name] for name in ("q", "k", "v", "gate", "up"))


def check_search(case: Case) -> None:
    for group, found in _searched(case):
        assert_close(found.losses, case[f"out_{group}_loss"], rtol=1e-4, atol=0)
        assert found.ratio == case[f"out_{group}_ratio"]
        assert_close(found.scale, case[f"out_{group}_scale"], rtol=1e-5, atol=0)


def check_smoothing(case: Case) -> None:
    for group in ("attn", "mlp"):
        most = case[f"out_{group}_x"].abs().flatten(0, 1).amax(0)
        weights = [case[name.rpartition(".")[2]] for name in GROUPS[group]]
        assert_close(smoothing(most, weights), case[f"out_smooth_{group}"], rtol=1e-5, atol=0)


def check_folded(case: Case) -> None:
    """Dividing a linear's input is what folding does: norms and the rows of feeders are divided instead."""
    block = _block(case)
    for group, names in GROUPS.items():
        if f"out_{group}_scale" in case:
            for name in names:
                ours = block.weight(name) * equalising(mean_size(block, names[0]), case[f"out_{group}_ratio"])
                folded = case[f"out_folded_{name.rpartition('.')[2]}"]
                taker = {"v_proj": "out_o_scale", "up_proj": "out_down_scale"}.get(name.rpartition(".")[2], "")
                assert_close(folded if taker not in case else folded * case[taker][:, None], ours, rtol=1e-4, atol=1e-5)


def _block(case: Case) -> Trial:
    """The norms stand in the files as they are once the scales were folded into them."""
    norms = {
        "input_norm": case["input_norm"] * case["out_attn_scale"],
        "post_norm": case["post_norm"] * case["out_mlp_scale"],
    }
    return trial({**case, **norms})


def _searched(case: Case) -> Iterator[tuple[str, Found]]:
    block = _block(case)

    def rounding(weight: Tensor) -> Tensor:
        """The code's grids need not span 0: of groups with weights of one sign they cut some off, which ours do not."""
        span = spans(weight, case["group_size"], zero=case["a_bits"] < 16)
        return Grid.between(*span, case["w_bits"], symmetric=case["a_bits"] < 16).rounded(weight)

    visual, answer = (case[mask].bool() for mask in ("vis_mask", "ans_mask"))
    for group, names in GROUPS.items():
        if f"out_{group}_scale" in case:
            ratio = case["ratio_attn"] if group in ("attn", "o") else case["ratio_mlp"]
            if case["use_masks"]:
                heed = row_weights(visual, answer, ratio, (int(visual.sum()), int(answer.sum())), bool(case["mse"]))
            else:
                heed = torch.ones(visual.shape) / visual.numel()
            yield (
                group,
                search(
                    block.inspect(names),
                    {name: block.weight(name) for name in names},
                    mean_size(block, names[0]),
                    lambda part: heed,  # noqa: B023
                    rounding,
                    activations=case["a_bits"],
                    power=1 + case["mse"],
                ),
            )
