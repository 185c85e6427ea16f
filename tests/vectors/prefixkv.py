"""PrefixKV: importance, the released search, the cut, and what single steps of decoding evict."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.signal import Columns, Numbers, Site
from foveate.methods import PrefixKV
from foveate.methods.kv_cache.prefixkv import best_of_layer, bisected_drops, evicted, exact_counts, importance, slot
from tests.vectors import Case


def check_importance(case: Case) -> None:
    layout = _layout(case)
    scores = torch.stack([importance(means, layout.valid) for means in _column_means(case)])

    assert_close(scores, case["out_importance"], atol=1e-5, rtol=1e-5)


def check_released_search(case: Case) -> None:
    scores, live = case["out_importance"][:, :1], torch.full((_layers(case), 1), _length(case))
    target = torch.tensor([_layers(case) * _length(case) * case["cfg_drop_ratio"]])
    drops = bisected_drops(scores, live, target, case["cfg_start_size"] + 1)

    assert drops[:, 0].tolist() == case["out_search_drop"].tolist()


def check_exact_search_meets_the_budget_at_one_threshold(case: Case) -> None:
    scores, live = case["out_importance"], torch.full((_layers(case), _samples(case)), _length(case))
    protect = case["cfg_start_size"] + 1
    budget = torch.full((_samples(case),), int(_layers(case) * _length(case) * (1 - case["cfg_drop_ratio"])))
    counts = exact_counts(scores, live, budget, protect)

    assert counts.sum(0).tolist() == budget.tolist()
    ordered = (scores / scores.sum(-1, keepdim=True)).sort(dim=-1, descending=True).values.cumsum(-1)
    for sample in range(_samples(case)):
        chosen = [int(count) - protect for count in counts[:, sample]]
        reached = [float(ordered[layer, sample, kept - 2]) for layer, kept in enumerate(chosen) if kept > 1]
        missed = [float(ordered[layer, sample, kept - 1]) if kept else 0.0 for layer, kept in enumerate(chosen)]
        full = [kept == _length(case) - protect for kept in chosen]
        assert max(reached, default=0.0) <= min((m for m, f in zip(missed, full) if not f), default=1.0) + 1e-6


def check_cut(case: Case) -> None:
    plan = _plan(case)

    assert [_entries(kept, 0, case) for kept in plan] == [_positions(row) for row in case["out_kept"][0]]


def check_cut_of_every_sample_with_the_first_ones_numbers(case: Case) -> None:
    layout = _layout(case)
    for layer, dropped in enumerate(case["out_drop"].tolist()):
        counts = [_length(case) - dropped] * _samples(case)
        kept = best_of_layer(case["out_importance"][layer], layout, counts, case["cfg_start_size"])

        assert kept[:, 0].tolist() == [_positions(row) for row in case["out_kept"][:, layer]]


def check_slot(case: Case) -> None:
    kept = [len(_positions(row)) for row in case["out_kept"][0]]

    assert [slot(count, case["cfg_distance"]) for count in kept] == case["out_slot"].tolist()


def check_decoding(case: Case) -> None:
    method, length = _method(case), _length(case)
    for layer in range(_layers(case)):
        cache = _positions(case["out_kept"][0, layer])
        prompt = len(cache)
        for t, published in enumerate(case["out_decode_kept"][:, layer]):
            cache.append(length + t)
            share = 1 - float(case["in_ratios"][layer]) if "in_ratios" in case else prompt / length
            where = evicted(len(cache), length + t + 1, share, prompt, case["cfg_distance"])
            if "in_ratios" not in case:
                # The release evicts behind a step, we before the next one: the state between them is the same.
                assert where == method.step(layer, prompt, len(cache), length + t + 2, length)
            if where is not None:
                del cache[where]
            assert cache == _positions(published), (layer, t)


def _method(case: Case) -> PrefixKV:
    return PrefixKV(
        keep=1 - case["cfg_drop_ratio"],
        search="bisect" if case["cfg_profile"] else "offline",
        start_size=case["cfg_start_size"],
        distance=case["cfg_distance"],
    )


def _layout(case: Case) -> Layout:
    text = torch.zeros(_samples(case), _length(case), dtype=torch.bool)
    positions = torch.arange(_length(case)).expand(1, _samples(case), -1)
    return Layout.build(text, ~text, positions, [[]] * _samples(case))


def _column_means(case: Case) -> Tensor:
    """``[L, B, S]`` as the engine records them: over heads, and over the queries that see the key."""
    seen_by = torch.arange(_length(case), 0, -1)
    return case["in_attention"].mean(2).sum(2) / seen_by


def _plan(case: Case) -> list[Kept | None]:
    method, layout = _method(case), _layout(case)
    seen = {Columns(Site("decoder", layer)): means for layer, means in enumerate(_column_means(case))}
    if not case["cfg_profile"]:
        seen[Numbers("prefixkv")] = {"keep": [method.keep], "dropped": [case["in_ratios"].tolist()]}  # type: ignore[index]
    empty = torch.zeros(_samples(case), 1, _length(case), 1)
    scores = [method.score(layer, empty, empty, seen, layout) for layer in range(_layers(case))]
    return method.plan(scores, [layout] * _layers(case))


def _entries(kept: Kept | None, sample: int, case: Case) -> list[int]:
    return list(range(_length(case))) if kept is None else _positions(kept.entries[sample, 0])


def _positions(row: Tensor) -> list[int]:
    return [entry for entry in row.tolist() if entry >= 0]


def _layers(case: Case) -> int:
    return case["in_attention"].shape[0]


def _samples(case: Case) -> int:
    return case["in_attention"].shape[1]


def _length(case: Case) -> int:
    return case["in_attention"].shape[-1]
