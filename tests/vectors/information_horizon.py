"""Information Horizon: the tokens of each window, and what each says of the answer (the stages are no part of the probe)."""

from __future__ import annotations

import torch
from torch.testing import assert_close

from foveate.bench.probes.horizon import information, window_of
from tests.vectors import Case


def check_windows(case: Case) -> None:
    side, size = case["cfg_grid"], case["cfg_window"]
    number = window_of(side, side, size)

    for x, column in enumerate(case["out_windows"]):
        for y, tokens in enumerate(column):
            assert (number == y * (side // size) + x).nonzero()[:, 0].tolist() == tokens.tolist()


def check_information(case: Case) -> None:
    side, size = case["cfg_grid"], case["cfg_window"]
    by_window = case["in_window_logits"].transpose(0, 1).flatten(0, 1)  # theirs count columns first

    found = information(by_window, case["in_base_logits"], case["cfg_label"])

    expected = case["out_token_scores"] - case["out_p_base"]
    assert_close(found[window_of(side, side, size)], expected, atol=1e-6, rtol=0)
    assert torch.isfinite(found).all()
