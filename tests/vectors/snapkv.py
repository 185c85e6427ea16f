"""Systems of one folder. SnapKV: the window's attention, pooled scores, and the entries that stay; PyramidKV: budgets and
entries; H2O as observed attention: scores and entries; StreamingLLM: entries, and keys turned to places in the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.bounded import Held
from foveate.core.layout import Layout
from foveate.core.roles import last_of
from foveate.core.signal import Attention, Columns, Rows, Site
from foveate.engine.attention import chosen_rows
from foveate.methods import H2O, PyramidKV, SnapKV, StreamingLLM
from foveate.methods.kv_cache.entries import best_entries
from foveate.methods.kv_cache.pyramidkv import pyramid
from foveate.methods.kv_cache.snapkv import window_scores
from foveate.ops.attention import columns
from tests.vectors import Case


def check_window_attention(case: Case) -> None:
    window = case["cfg_window_size"]
    cut = _observed(case).probabilities()[..., :-window]

    assert_close(cut, case["out_snapkv_window_attention"], atol=1e-5, rtol=0)


def check_scores(case: Case) -> None:
    _assert_scored(_score(case), case["out_snapkv_score"], case["cfg_window_size"])


def check_entries_kept(case: Case) -> None:
    layout = _layout(case)
    (kept,) = _method(case).plan([_score(case)], [layout])
    everything = torch.arange(layout.shape[1]).expand_as(case["in_key"][..., 0])

    assert (everything if kept is None else kept.entries).tolist() == case["out_snapkv_kept"].tolist()


def check_scores_from_the_full_map(case: Case) -> None:
    _assert_scored(_score_from_map(case), case["out_snapkv_from_attention_score"], case["cfg_window_size"])


def check_entries_kept_from_the_full_map(case: Case) -> None:
    layout, published = _layout(case), case["out_snapkv_from_attention_kept"]
    kept = best_entries(_score_from_map(case), layout.valid, [published.shape[-1]] * layout.shape[0])

    assert kept.tolist() == published.tolist()


def check_pyramid_budgets(case: Case) -> None:
    layers, rows = len(case["out_pyramid_budget"]), _layout(case).shape[1]

    assert [_pyramid(case)._count(rows, layer, layers) for layer in range(layers)] == case["out_pyramid_budget"].tolist()


def check_pyramid_budgets_of_the_table(case: Case) -> None:
    for (rows, ratio, window, beta, layers), published in zip(case["in_budget_queries"].double(), case["out_budget_table"]):
        count, kept = int(layers), float(rows * (1 - ratio))
        depths = (0, 1, count // 2, count - 1)

        assert [pyramid(kept, int(rows), int(window), layer, count, int(beta)) for layer in depths] == published.tolist()


def check_pyramid_entries_kept(case: Case) -> None:
    layout, layers = _layout(case), len(case["out_pyramid_budget"])
    plans = _pyramid(case).plan([_score(case)] * layers, [layout] * layers)
    kept = plans[case["cfg_layer_idx"]]
    everything = torch.arange(layout.shape[1]).expand_as(case["in_key"][..., 0])

    assert (everything if kept is None else kept.entries).tolist() == case["out_pyramid_kept"].tolist()


def check_observed_scores(case: Case) -> None:
    assert_close(_observed_score(case), case["out_observed_score"], atol=1e-5, rtol=0)


def check_observed_entries_kept(case: Case) -> None:
    layout = _layout(case)
    (kept,) = _h2o(case).plan([_observed_score(case)], [layout])
    everything = torch.arange(layout.shape[1]).expand_as(case["in_key"][..., 0])

    assert (everything if kept is None else kept.entries).tolist() == case["out_observed_kept"].tolist()


def check_streaming_scores(case: Case) -> None:
    score = _streaming_score(case)
    assert torch.equal(score.expand_as(case["out_streaming_score"]), case["out_streaming_score"])


def check_streaming_entries_kept(case: Case) -> None:
    layout = _layout(case)
    (kept,) = _streaming(case).plan([_streaming_score(case)], [layout])
    entries = torch.arange(layout.shape[1])[None, None] if kept is None else kept.entries

    assert entries.expand_as(case["out_streaming_kept"]).tolist() == case["out_streaming_kept"].tolist()


def check_streaming_keys_turned(case: Case) -> None:
    sinks, kept = case["cfg_n_sink"], case["out_streaming_kept"].shape[2]
    positions = torch.arange(case["in_key"].shape[2])[None]

    def turned(layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        angle = (new - old)[0, :, None] * case["in_inv_freq"]
        cos, sin = (torch.cat([table, table], dim=-1) for table in (angle.cos(), angle.sin()))
        first, second = keys.chunk(2, dim=-1)
        return keys * cos + torch.cat([-second, first], dim=-1) * sin

    for keys, published in zip(case["in_key"], case["out_streaming_rerotated_key"]):
        held = Held(keys[None], keys[None], positions, sinks)
        (left,) = StreamingLLM(keep=kept - sinks, sinks=sinks).retain([held], turned, None)
        assert_close(left.keys[0], published, atol=1e-5, rtol=0)
        assert left.positions.tolist() == [list(range(kept))]


def _assert_scored(scores: Tensor, published: Tensor, window: int) -> None:
    """Ours puts the window above the largest score of its sample, theirs above that of the batch."""
    assert_close(scores[..., :-window], published[..., :-window], atol=1e-5, rtol=0)
    largest = published[..., :-window].amax((1, 2), keepdim=True)
    assert_close(scores[..., -window:], (largest + 1).expand_as(scores[..., -window:]), atol=1e-5, rtol=0)


def _method(case: Case) -> SnapKV:
    keep = 1 - case["cfg_compression_ratio"]
    return SnapKV(keep=keep, window=case["cfg_window_size"], kernel=case["cfg_kernel_size"])


def _pyramid(case: Case) -> PyramidKV:
    plain = _method(case)
    return PyramidKV(keep=plain.keep, window=plain.window, kernel=plain.kernel, beta=case["cfg_beta"])


def _layout(case: Case) -> Layout:
    batch, rows = case["in_hidden"].shape[:2]
    text = torch.zeros(batch, rows, dtype=torch.bool)
    return Layout.build(text, ~text, torch.arange(rows).expand(1, batch, -1), [[]] * batch)


def _observed(case: Case) -> Attention:
    """The window's rows as the engine records them, from rotated queries and keys."""
    batch, rows, _ = case["in_hidden"].shape
    query = case["in_hidden"].reshape(batch, rows, case["cfg_num_heads"], -1).transpose(1, 2)
    cos, sin = case["in_cos"][:, None], case["in_sin"][:, None]
    first, second = query.chunk(2, dim=-1)
    rotated = query * cos + torch.cat([-second, first], dim=-1) * sin
    window = last_of(_layout(case).valid, case["cfg_window_size"])
    return chosen_rows(rotated, case["in_key"], query.shape[-1] ** -0.5, None, window)


def _score(case: Case) -> Tensor:
    method = _method(case)
    observed = {Rows(Site("decoder"), method.window, keys="cache"): _observed(case)}
    score = method.score(0, case["in_key"], case["in_value"], observed, _layout(case))
    assert score is not None
    return score


def _score_from_map(case: Case) -> Tensor:
    width, rows = case["cfg_window_size"], case["in_key"].shape[2]
    window = (torch.arange(rows) >= rows - width).expand(len(case["in_key"]), -1)
    return window_scores(case["in_attention"][:, :, -width:], window, case["in_key"].shape[1], case["cfg_kernel_size"])


def _h2o(case: Case) -> H2O:
    return H2O(keep=1 - case["cfg_compression_ratio"], recent=0.0, received="mean", steps=False)


def _observed_score(case: Case) -> Tensor:
    """Scores of a map as it is: its logits are those of one-hot keys."""
    attention, rows = case["in_attention"], case["in_key"].shape[2]
    one_hot = torch.eye(rows).expand(*case["in_key"].shape[:2], -1, -1)
    causal = torch.ones(1, rows, rows, dtype=torch.bool).tril()
    means = columns(attention.clamp(min=1e-30).log(), one_hot, 1.0, causal, by_head=True)
    observed = {Columns(Site("decoder"), by_head=True): means.transpose(1, 2)}
    score = _h2o(case).score(0, case["in_key"], case["in_value"], observed, _layout(case))
    assert score is not None
    return score


def _streaming(case: Case) -> StreamingLLM:
    return StreamingLLM(keep=1 - case["cfg_compression_ratio"], sinks=case["cfg_n_sink"], steps=False)


def _streaming_score(case: Case) -> Tensor:
    score = _streaming(case).score(0, case["in_key"], case["in_value"], {}, _layout(case))
    assert score is not None
    return score
