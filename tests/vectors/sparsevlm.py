"""SparseVLM and SparseVLM+: raters, scores, rank, clusters, and the sequence behind one layer.

Tokens that are each other's nearest are equally dense. The published code draws noise, which a case has; ours takes the
first, so tokens are put in the order of that noise here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Edit, Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Attention, Function, KeyValue, Rows, Site
from foveate.core.state import State
from foveate.methods import SparseVLM
from foveate.methods.in_llm.sparsevlm import ranks, rated, rating, rotation_alone
from foveate.ops.cluster import density_peaks
from foveate.ops.select import top_k
from tests.methods.bodiless import traits
from tests.methods.llama import rotate
from tests.vectors import Case

LAYER = 2


def check_raters(case: Case) -> None:
    relevance, raters = _rating(case)

    assert_close(relevance[0], case["out_rater_score"], atol=1e-6, rtol=0)
    assert raters[0].nonzero()[:, 0].tolist() == case["out_raters"].tolist()


def check_scores(case: Case) -> None:
    scores = _rows(case)[0].sum(0)[_image(case)] / len(case["out_raters"])
    wanted = case["out_score"]

    assert_close(scores, wanted, atol=1e-5 * wanted.abs().max().item() if case["cfg_v2"] else 1e-6, rtol=0)
    assert top_k(scores, len(case["out_kept"])).sort().values.tolist() == case["out_kept"].tolist()


def check_heads_and_rotation(case: Case) -> None:
    if not case["cfg_v2"]:
        return
    bias, attention = _bias(case), _attention(case)
    _, raters = _rating(case)
    seen = (attention / bias[:, None])[0, :, raters[0]][..., _image(case)]

    assert_close(bias[0, -1], case["out_rope_bias_last_row"], atol=1e-5, rtol=1e-5)
    assert top_k(seen.sum((1, 2)), 14).sort().values.tolist() == case["out_heads"].tolist()


def check_rank(case: Case) -> None:
    _, raters = _rating(case)
    rows = rated(_attention(case), raters, _layout(case).rows(*VISUAL))
    (rank,) = ranks(rows, raters, (case["cfg_num_image"],))
    kept = min(int(rank * case["cfg_rank_scale"] + case["cfg_rank_bias"]), case["cfg_num_image"] - 1)

    assert rank == case["out_rank"]
    assert kept == len(case["out_rank_kept"])


def check_clusters(case: Case) -> None:
    if case["cfg_v2"]:
        return
    again, count = case["out_recycled"], len(case["out_cluster_centres"])
    centres, cluster = _as_drawn(case)(case["in_hidden"][case["cfg_image_start"] + again][None], count, count)

    assert centres[0].tolist() == case["out_cluster_centres"].tolist()
    assert cluster[0].tolist() == case["out_cluster_assign"].tolist()


def check_sequence(case: Case) -> None:
    layout, x = _layout(case), case["in_hidden"][None]
    # A budget of all that is there is nothing to us; the code drops one and gives it back as a cluster of its own.
    keep = min(case["cfg_keep"], case["cfg_num_image"] - 1)
    method = SparseVLM(layers=(LAYER,), counts=(keep,), plus=bool(case["cfg_v2"])).fitted(traits())
    state, embeds = State(), case["in_embeds"][None]
    assert method.edit(Site("sequence"), embeds, layout, {}, state) is None
    with patch("foveate.methods.in_llm.sparsevlm.density_peaks", _as_drawn(case)):
        edit = method.edit(Site("decoder", LAYER), x, layout, _seen(case), state)
    assert isinstance(edit, Edit)
    after = layout.after(edit)

    assert_close(edit.reduction.apply(x)[0], case["out_hidden"], atol=3e-6, rtol=0)
    assert after.positions[0, 0].tolist() == case["out_position_ids"].tolist()
    assert after.visual == (case["out_num_image_after"],)


def _as_drawn(case: Case) -> Callable[[Tensor, int, int], tuple[Tensor, Tensor]]:
    def clusters(x: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
        order = case["in_noise"][: x.shape[1]].argsort(descending=True)
        centres, cluster = density_peaks(x[:, order], count, neighbours)
        return order[centres], torch.zeros_like(cluster).index_copy(1, order, cluster)

    return clusters


def _image(case: Case) -> slice:
    return slice(case["cfg_image_start"], case["cfg_image_start"] + case["cfg_num_image"])


def _rating(case: Case) -> tuple[Tensor, Tensor]:
    visual, text = case["in_embeds"][None, _image(case)], case["in_embeds"][None, _image(case).stop :]
    return rating(visual, torch.ones(visual.shape[:2]).bool(), text, torch.ones(text.shape[:2]).bool())


def _attention(case: Case) -> Tensor:
    """Rows of the text behind the picture."""
    rows: Tensor = case["in_attn"][None, :, _image(case).stop :]
    return rows


def _layout(case: Case) -> Layout:
    visual = torch.zeros(1, len(case["in_embeds"]), dtype=torch.bool)
    visual[:, _image(case)] = True
    positions = case.get("in_position_ids", torch.arange(visual.shape[1]))
    return Layout.build(visual, torch.ones_like(visual), positions[None, None], [[Item(1, case["cfg_num_image"], 0)]])


def _bias(case: Case) -> Tensor:
    layout = _layout(case)
    ones = torch.ones(1, 1, layout.shape[1], case["cfg_head_dim"])
    rows = torch.arange(_image(case).stop, layout.shape[1])[None]
    return rotation_alone(rotate(ones, layout.positions), rows)


def _rows(case: Case) -> Tensor:
    _, raters = _rating(case)
    attention, visual = _attention(case), _layout(case).rows(*VISUAL)
    if case["cfg_v2"]:
        return rated(attention / _bias(case)[:, None], raters, visual, 14)
    return rated(attention, raters, visual)


def _seen(case: Case) -> dict[Any, Any]:
    attention = _attention(case)
    keys = torch.zeros(1, 1, attention.shape[3], case["cfg_head_dim"])
    return {
        Rows(Site("decoder", LAYER - 1), "question"): Attention(attention.log(), torch.zeros(attention.shape[:3])),
        KeyValue(Site("decoder", LAYER - 1)): (keys, keys),
        Function("rotate", LAYER - 1): rotate,
    }
