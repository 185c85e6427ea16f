"""SparseVILA: column means of the published kernel, and the visual entries that they retrieve."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.method import Entries
from foveate.core.signal import Attention, Rows, Site
from foveate.methods import SparseVILA
from foveate.methods.kv_cache.sparsevila import column_mean
from foveate.ops.attention import columns, row_logits
from tests.vectors import Case


def check_columns_without_a_mask(case: Case) -> None:
    received = columns(case["in_query"], case["in_key"], _scale(case))

    assert_close(received, case["out_mean_full"].mean(1), atol=1e-6, rtol=0)


def check_columns_under_the_causal_mask(case: Case) -> None:
    received = columns(case["in_query"], case["in_key"], _scale(case), _causal(case)[None])

    assert_close(received, case["out_mean_causal"].mean(1), atol=1e-6, rtol=0)


def check_column_means_of_rows(case: Case) -> None:
    rows = case["in_query"].shape[2]
    means = column_mean(_attention(case), torch.tensor([rows]))

    # Over all rows, also those that cannot see a key: the kernel's mean wherever all can, its sum everywhere.
    assert_close(means * rows, case["out_sum_causal"].mean(1), atol=1e-5, rtol=0)
    everywhere = case["in_key"].shape[2] - rows + 1
    assert_close(means[:, :everywhere], case["out_mean_causal"].mean(1)[:, :everywhere], atol=1e-6, rtol=0)


def check_visual_scores(case: Case) -> None:
    start, end = _span(case)
    means = column_mean(_attention(case), torch.tensor([case["in_query"].shape[2]]))

    assert_close(means[0, start:end], case["derived_visual_score"], atol=1e-6, rtol=0)


def check_entries_retrieved(case: Case) -> None:
    start, end = _span(case)
    entries, rows = case["in_key"].shape[2], case["in_query"].shape[2]
    visual = torch.zeros(1, entries, dtype=torch.bool)
    visual[:, start:end] = True
    turn = torch.arange(entries - rows, entries)[None]
    layout = Layout.build(torch.zeros_like(turn).bool(), torch.ones_like(turn).bool(), turn[None], [[]])
    view = SparseVILA(decode_keep=case["cfg_keep"]).view(
        0,
        Entries(torch.arange(entries)[None, None], visual[:, None], (end - start,)),
        {Rows(Site("decoder", 0), "question", keys="cache"): _attention(case)},
        layout,
    )
    read = list(range(entries)) if view is None else view[0, 0].tolist()

    assert [entry for entry in read if not start <= entry < end] == [*range(start), *range(end, entries)]
    assert [entry - start for entry in read if start <= entry < end] == case["derived_kept"].tolist()


def _span(case: Case) -> tuple[int, int]:
    start, end = case["cfg_visual_span"].tolist()
    if end == 0:
        pytest.skip("the case is an encoder's, there is nothing to retrieve")
    return start, end


def _scale(case: Case) -> float:
    return float(case["cfg_scale"] if case["cfg_scale"] >= 0 else case["in_query"].shape[-1] ** -0.5)


def _causal(case: Case) -> Tensor:
    """``[M, N]`` which key each of the last M queries sees."""
    rows, keys = case["in_query"].shape[2], case["in_key"].shape[2]
    return torch.arange(keys) <= torch.arange(keys - rows, keys)[:, None]


def _attention(case: Case) -> Attention:
    logits = row_logits(case["in_query"], case["in_key"], _scale(case)).masked_fill(~_causal(case), float("-inf"))
    return Attention(logits, logits.logsumexp(-1))
