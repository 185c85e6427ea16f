"""ApET: the basis, the errors of approximation, what stays and what it is made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.roles import Item
from foveate.methods.before_llm.apet import approximation_errors, edit_of
from foveate.ops.farthest import farthest_first
from foveate.ops.select import top_k
from tests.vectors import Case

RIDGE = {"qwen_llm": 1e-1}
BLEND = {"qwen_llm": 0.5}


def check_basis(case: Case) -> None:
    x = _tokens(case)

    assert farthest_first(x, case["basis"], case["fps_start"], metric="euclidean").tolist() == _basis(case).tolist()


def check_errors(case: Case) -> None:
    assert_close(_errors(case), case["errors"].reshape(_tokens(case).shape[:2]), atol=1e-4, rtol=0)


def check_order(case: Case) -> None:
    order, theirs = top_k(_errors(case), case["keep_num"]), case["order"].reshape(len(_tokens(case)), -1)
    sure = case["keep_num"] - (case["basis"] if _keeps_all(case) else 0)

    assert order[:, :sure].tolist() == theirs[:, :sure].tolist()
    assert order.sort(dim=1).values.tolist() == case["keep"].reshape(theirs.shape).tolist()


def check_tokens(case: Case) -> None:
    if _keeps_all(case):
        pytest.skip("defect of the published code: where nothing is dropped the tokens of the basis change places")
    x = _tokens(case)
    batch, count, _ = x.shape
    prompt = torch.cat([x, x[:, :1]], dim=1)  # a row of text behind the picture, so that none of its own has to stay
    valid = torch.ones(batch, count + 1, dtype=torch.bool)
    visual, positions = valid.cumsum(1) <= count, torch.arange(count + 1).expand(1, batch, -1)
    layout = Layout.build(visual, valid, positions, [[Item(1, count, image)] for image in range(batch)])
    edit = edit_of(
        prompt,
        layout,
        [case["keep_num"]] * batch,
        case["basis"],
        case["fps_start"],
        ridge=RIDGE.get(case["variant"], 1e-5),
        blend=BLEND.get(case["variant"], 1.0),
        raster=case["variant"] == "encoder",
    )

    tokens = edit.reduction.apply(prompt)

    assert edit.reduction.anchor[:, :-1].tolist() == case["keep"].reshape(batch, -1).tolist()
    assert_close(tokens[:, :-1], case["tokens"].reshape(batch, -1, x.shape[2]), atol=1e-4, rtol=0)
    assert torch.equal(tokens[:, -1], prompt[:, -1])


def _tokens(case: Case) -> Tensor:
    x = case["x"]
    return x if x.ndim == 3 else x[None]


def _basis(case: Case) -> Tensor:
    return case["fps"].reshape(-1, case["basis"])


def _errors(case: Case) -> Tensor:
    basis = _basis(case)
    return approximation_errors(_tokens(case), basis, torch.ones_like(basis).bool(), RIDGE.get(case["variant"], 1e-5))


def _keeps_all(case: Case) -> bool:
    return case["keep_num"] == _tokens(case).shape[1]
