"""VLM-Pruner: pivots, the tokens kept, and what the others are folded into."""

from __future__ import annotations

import math
from unittest.mock import patch

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item
from foveate.core.signal import KeyValue, Site
from foveate.core.state import State
from foveate.methods import VLMPruner
from foveate.methods.in_llm import vlm_pruner
from foveate.ops.farthest import farthest_first
from tests.vectors import Case

LAYER = 2


def check_pivots(case: Case) -> None:
    keys = case["keys"].transpose(0, 1).flatten(1)[_image(case)][None]
    order = farthest_first(keys, case["n_pivot"], keys.abs().sum(2).argmax(1), metric="euclidean")

    assert order[0].tolist() == case["pivots"].tolist()


def check_kept(case: Case) -> None:
    reduction = _reduction(case)
    kept = reduction.anchor[0] - case["img_start"]

    assert kept[(kept >= 0) & (kept < case["n_img"])].tolist() == case["keep"].tolist()


def check_hidden(case: Case) -> None:
    reduction = _reduction(case)
    hidden = reduction.apply(case["hidden"][None])[0]
    kept = reduction.anchor[0] - case["img_start"]
    image = (kept >= 0) & (kept < case["n_img"])

    assert_close(hidden[image], case["hidden_kept"], atol=1e-4, rtol=0)
    assert torch.equal(hidden[~image], case["hidden"][reduction.anchor[0][~image]])


def _image(case: Case) -> slice:
    return slice(case["img_start"], case["img_start"] + case["n_img"])


def _reduction(case: Case) -> Reduction:
    """As the published code stops: at a round that accepts nothing."""
    visual = torch.zeros(1, len(case["hidden"]), dtype=torch.bool)
    visual[:, _image(case)] = True
    columns = case["grid_w"]
    item = Item(case["n_img"] // columns, columns, 0)
    layout = Layout.build(visual, torch.ones_like(visual), torch.arange(visual.shape[1])[None, None], [[item]])
    method = VLMPruner(
        layer=LAYER,
        keep=1 - case["reduction_ratio"],
        pivots=case["n_pivot"],
        tau=case["tau0"],
        batch=case["batch"],
        gives_up=True,
        rounding="round" if case["variant"] == "llava" else "floor",
    )
    keys = case["keys"][None]

    def places(layout: Layout) -> Tensor:
        # In the code for LLaVA the diagonal is that of 24 x 24 whatever the picture.
        return layout.yx / math.hypot(case["grid_h"], case["grid_w"])

    with patch.object(vlm_pruner, "_places", places):
        edit = method.edit(
            Site("decoder", LAYER),
            case["hidden"][None],
            layout,
            {KeyValue(Site("decoder", LAYER - 1)): (keys, keys)},
            State(),
        )
    assert edit is not None
    return edit.reduction
