"""DivPrune: the order of selection, and the tokens kept."""

from __future__ import annotations

import torch

from foveate.core.budget import Budget
from foveate.methods.before_llm.divprune import spread_out
from foveate.ops.farthest import farthest_first
from tests.vectors import Case


def check_order(case: Case) -> None:
    order = farthest_first(case["x"][None], _count(case))

    assert order[0].tolist() == case["order"].tolist()


def check_kept(case: Case) -> None:
    x = case["x"][None]
    mask = spread_out(x, torch.arange(x.shape[1])[None], [_count(case)])

    assert mask[0].nonzero()[:, 0].tolist() == case["keep"].tolist()


def _count(case: Case) -> int:
    return Budget(case["ratio"]).of(len(case["x"]))
