"""HiDrop: the card's presets, limits and invariants."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.roles import VISUAL, Item
from foveate.core.signal import Function, Site
from foveate.core.state import State
from foveate.methods import HiDrop
from foveate.ops.attention import from_rows
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits
from tests.methods.llama import random_query_key

ONE_STAGE: dict[str, Any] = {"late_entry": 2, "layer_list": (5,), "early_exit": 9}


def hidden(prompt: Layout, seed: int = 0) -> torch.Tensor:
    return torch.randn(*prompt.shape, 4, generator=torch.Generator().manual_seed(seed))


def edit(method: HiDrop, prompt: Layout, layer: int, seed: int = 0) -> Edit | None:
    seen = {Function("query_key", layer): random_query_key(4, seed=seed)}
    return method.fitted(traits()).edit(Site("decoder", layer), hidden(prompt, seed), prompt, seen, State())


def llava(tokens: int = 576) -> Layout:
    visual = torch.zeros(1, tokens + 4, dtype=torch.bool)
    visual[:, 1 : tokens + 1] = True
    return Layout.build(visual, torch.ones_like(visual), torch.arange(tokens + 4)[None, None], [[Item(1, tokens, 0)]])


@pytest.mark.parametrize(("preset", "mean"), [("tok48", 48.0), ("tok64", 64.0), ("tok80", 80.03)])
def test_the_presets_have_the_published_mean_counts(preset: Any, mean: float) -> None:
    method = HiDrop(preset=preset)
    prompt, counts = llava(), []
    for layer in range(32):
        if Site("decoder", layer) in method.sites(traits()):
            change = edit(method, prompt, layer)
            assert change is not None
            prompt = prompt.after(change)
        counts.append(0 if layer in method.routed(traits()) else prompt.visual[0])

    assert sum(counts) / 32 == pytest.approx(mean, abs=0.005)


def test_the_published_schedule() -> None:
    method = HiDrop()

    assert method.routed(traits()) == tuple(range(8))
    assert method.sites(traits()) == tuple(Site("decoder", layer) for layer in (10, 14, 16, 18, 24))
    assert method.reads(traits()) == tuple(Function("query_key", layer) for layer in (10, 14, 16, 18))


def test_before_the_entry_visual_rows_are_not_there() -> None:
    prompts_ = layout("t11t2", "..ttt")
    plan = HiDrop().plan(0, hidden(prompts_), prompts_, {}, State())
    assert plan is not None

    assert plan.active.tolist() == [[True, False, False, True, False], [False, False, True, True, True]]
    assert (plan.frozen, plan.counts) == (False, (2, 3))


def test_a_prompt_without_images_runs_plainly() -> None:
    assert HiDrop().plan(0, hidden(layout("ttt")), layout("ttt"), {}, State()) is None
    assert edit(HiDrop(), layout("ttt"), 10) is None
    assert edit(HiDrop(), layout("ttt"), 24) is None


def test_at_the_exit_all_visual_rows_go_and_positions_stay() -> None:
    prompt = layout("t111t2t")
    change = edit(HiDrop(), prompt, 24)
    assert change is not None
    after = prompt.after(change)

    assert (after.origin.tolist(), after.positions.tolist()) == ([[0, 4, 6]], [[[0, 4, 6]]])
    assert (after.live, after.visual) == ((3,), (0,))


@pytest.mark.parametrize(("keep", "left"), [(3, 3), (0, 0), (99, 6), (0.5, 3), (0.01, 1), (0.0, 0), (1.0, 6)])
def test_a_stage_keeps_a_count_or_a_share(keep: float, left: int) -> None:
    prompt = layout("t111222t")
    change = edit(HiDrop(**ONE_STAGE, keep_list=(keep,)), prompt, 5)

    assert (prompt if change is None else prompt.after(change)).visual == (left,)


def test_shares_are_of_the_original_count() -> None:
    method = HiDrop(late_entry=1, layer_list=(5, 6), keep_list=(0.5, 0.25), early_exit=0)
    prompt = layout("t" + "1" * 16 + "t")
    first = edit(method, prompt, 5)
    assert first is not None
    second = edit(method, prompt.after(first), 6)
    assert second is not None

    assert (first.visual, second.visual) == ((8,), (4,))


@given(prompts(text_last=True), st.integers(0, 4), st.integers(0, 99))
def test_the_best_by_the_last_row_stay_with_their_positions(before: Layout, keep: int, seed: int) -> None:
    change = edit(HiDrop(**ONE_STAGE, keep_list=(keep,)), before, 5, seed)
    after = before if change is None else before.after(change)
    query, key = random_query_key(4, seed=seed)(hidden(before, seed), before)
    scores = from_rows(query, key, before.last, before.valid[:, None])

    assert_close(scores.sum(1), torch.ones(before.shape[0]))
    assert after.visual == tuple(min(keep, count) for count in before.visual)
    for b, (origin, valid) in enumerate(zip(after.origin, after.valid)):
        stays = torch.zeros_like(before.valid[b]).scatter(0, origin[valid], True)
        gone = before.valid[b] & ~stays
        assert not (gone & ~before.rows(*VISUAL)[b]).any()
        best = stays & before.rows(*VISUAL)[b]
        assert not gone.any() or not best.any() or scores[b][gone].max() <= scores[b][best].min()
        assert torch.equal(after.positions[0, b][valid], before.positions[0, b][origin[valid]])


@given(prompts(), st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(before: Layout, seed: int) -> None:
    method, layer, x = HiDrop(**ONE_STAGE, keep_list=(0.4,)), random_query_key(4, seed=seed), hidden(before, seed)
    seen = {Function("query_key", 5): layer}
    together = method.edit(Site("decoder", 5), x, before, seen, State())
    after = before if together is None else before.after(together)

    for b in range(before.shape[0]):
        own = slice(b, b + 1)
        alone = Layout.build(before.rows(*VISUAL)[own], before.valid[own], before.positions[:, own], before.items[own])
        change = method.edit(Site("decoder", 5), x[own], alone, seen, State())
        one = alone if change is None else alone.after(change)
        assert after.origin[b][after.valid[b]].tolist() == one.origin[one.valid].tolist()


def test_at_its_identity_it_does_nothing() -> None:
    method = HiDrop(**HiDrop.identity_at)

    assert (method.sites(traits()), method.routed(traits()), method.reads(traits())) == ((), (), ())
    assert method.check(traits()) is None
    assert HiDrop(late_entry=1, layer_list=(), keep_list=(), early_exit=33).sites(traits()) == ()


def test_an_exit_at_the_entry_is_a_text_model() -> None:
    method = HiDrop(late_entry=9, layer_list=(), keep_list=(), early_exit=9)

    assert (method.routed(traits()), method.sites(traits())) == (tuple(range(8)), (Site("decoder", 8),))
    assert method.check(traits()) is None


@given(st.integers(4, 80), st.sampled_from(["tok48", "tok64", "tok80"]))
def test_the_presets_fit_every_depth(depth: int, preset: Any) -> None:
    model = traits(decoder_layers=depth)
    fit = HiDrop(preset=preset).fitted(model)

    assert HiDrop(preset=preset).check(model) is None
    assert fit.fitted(model) == fit
    assert fit.layer_list
    assert fit.keep_list
    assert all(early > late for early, late in zip(fit.keep_list, fit.keep_list[1:]))


def test_stages_that_fall_on_one_layer_become_the_last() -> None:
    fit = HiDrop().fitted(traits(decoder_layers=8))

    assert (fit.late_entry, fit.layer_list, fit.keep_list, fit.early_exit) == (3, (3, 4), (215 / 576, 1 / 576), 7)


@pytest.mark.parametrize(
    ("parameters", "reason"),
    [
        ({"late_entry": 33, "early_exit": 0}, "late_entry=33: must be in 1..32"),
        ({"late_entry": 9, "early_exit": 8}, "early_exit=8: must be in 9..33 (from late_entry on), or 0"),
        ({"early_exit": 34}, "early_exit=34: must be in 9..33 (from late_entry on), or 0"),
        (
            {"layer_list": (8,), "keep_list": (1,)},
            "layer_list=(8,): must be in 9..23 (between late_entry and early_exit)",
        ),
        (
            {"layer_list": (24,), "keep_list": (1,)},
            "layer_list=(24,): must be in 9..23 (between late_entry and early_exit)",
        ),
    ],
)
def test_a_schedule_out_of_order_is_refused(parameters: dict[str, Any], reason: str) -> None:
    assert HiDrop(**parameters).check(traits()) == reason


def test_parameters_are_refused_by_name() -> None:
    for name, parameters in [
        ("preset", {"preset": "tok1"}),
        ("late_entry", {"late_entry": 0}),
        ("early_exit", {"early_exit": -1}),
        ("layer_list", {"layer_list": (5, 4), "keep_list": (1, 1)}),
        ("keep_list", {"layer_list": (4,)}),
        ("keep_list", {"keep_list": (4,)}),
        ("keep_list", {"layer_list": (4, 5), "keep_list": (1,)}),
        ("keep_list", {"layer_list": (4,), "keep_list": (1.5,)}),
        ("keep_list", {"layer_list": (4,), "keep_list": (-1,)}),
    ]:
        with pytest.raises(FoveateError, match=f"^hidrop: {name}="):
            HiDrop(**parameters)  # type: ignore[arg-type]
