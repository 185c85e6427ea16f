"""SCOPE: saliency of the CLS row, greedy order, and the tokens in raster order."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.reduction import Reduction
from foveate.core.signal import Attention, Features, Rows, Site
from foveate.methods import Scope
from foveate.ops.cover import greedy_cover
from tests.methods.bodiless import images as images_of
from tests.vectors import Case

COMBINE = {"multi": "multiply", "add": "add"}
"""Our name of each of the released code's switches."""


def check_saliency(case: Case) -> None:
    saliency = _attention(case).probabilities().sum(1)[:, 0]

    assert_close(saliency, case["saliency"], atol=1e-6, rtol=0)


def check_order_of_selection(case: Case) -> None:
    order = greedy_cover(_features(case), case["saliency"], _budget(case), case["alpha"], COMBINE[case["combine"]])

    assert order.tolist() == case["order"].tolist()


def check_tokens_kept(case: Case) -> None:
    features = _features(case)
    images, count = features.shape[:2]
    method = Scope(alpha=case["alpha"], combine=COMBINE[case["combine"]])
    seen = {Features(): features, Rows(Site("encoder"), "cls"): _attention(case)}
    batch = images_of(1, count, (0,) * images, seen)
    kept = method.select(batch, _budget(case))

    assert kept.tolist() == case["keep"].tolist()
    assert torch.equal(Reduction.gather(kept, count).apply(features), case["tokens"])


def _budget(case: Case) -> int:
    return case["budget"] // len(case["hidden"])


def _features(case: Case) -> Tensor:
    return case["hidden"][:, 1:]


def _attention(case: Case) -> Attention:
    """The CLS row as the engine records it: patches only, while the softmax is over CLS and patches."""
    logits = case["attn_cls"][:, :, None].log()
    return Attention(logits[..., 1:], torch.zeros(logits.shape[:-1]))
