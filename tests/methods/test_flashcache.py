"""FlashCache: the card's sequence and budgets, against a filter in float64, and what always stays."""

from __future__ import annotations

from math import cos, pi
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.methods import FlashCache
from foveate.methods.kv_cache.flashcache import outliers
from tests.methods.bodiless import layout

HAND = torch.tensor([1.0, 1.0, 1.0, 5.0])[None, None, :, None]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def every(rows: int, batch: int = 1) -> tuple[Tensor, list[int]]:
    return torch.ones(batch, rows, dtype=torch.bool), [rows] * batch


@pytest.mark.parametrize(
    ("gamma", "deviation", "share", "first"),
    [(0.1, [1.0, 1.0, 1.0, 9.0], 12 / 28, 3), (0.25, [0.5, 0.0858, 2.9142, 1.6716], 0.1847, 2)],
)
def test_the_hand_example(gamma: float, deviation: list[float], share: float, first: int) -> None:
    found, rough = outliers(HAND, *every(4), gamma)

    assert_close(found[0], torch.tensor(deviation), atol=5e-5, rtol=0)
    assert_close(rough, torch.tensor([share]), atol=5e-5, rtol=0)
    assert int(found.argmax()) == first


@given(st.integers(2, 30), st.floats(0, 0.9), st.integers(0, 999))
def test_deviations_and_energy_are_those_of_the_transform_in_float64(rows: int, gamma: float, seed: int) -> None:
    states = drawn(1, 2, rows, 3, seed=seed) + 2
    basis = torch.tensor([[cos(pi * (2 * x + 1) * m / (2 * rows)) for x in range(rows)] for m in range(rows)]).double()
    basis = basis / basis.norm(dim=1, keepdim=True)
    flat = states[0].transpose(0, 1).flatten(1).double()
    spectrum, low = basis @ flat, int(gamma * rows) + 1
    power = spectrum.square().sum(1)
    deviation, rough = outliers(states, *every(rows), gamma)

    assert_close(deviation[0].double(), (basis[low:].T @ spectrum[low:]).square().mean(1), atol=1e-5, rtol=1e-4)
    assert_close(rough.double(), (power[low:].sum() / power.sum())[None], atol=1e-6, rtol=1e-4)


def test_a_constant_added_to_all_entries_changes_nothing() -> None:
    states, more = drawn(1, 2, 20, 3, seed=0), drawn(1, 2, 1, 3, seed=1) * 50

    assert_close(outliers(states + more, *every(20), 0.2)[0], outliers(states, *every(20), 0.2)[0], atol=1e-3, rtol=1e-3)


def test_a_ramp_is_smooth_and_a_spike_ranks_first() -> None:
    ramp = torch.linspace(0, 1, 50)[None, None, :, None]
    spike = ramp.clone()
    spike[0, 0, 23] += 1

    assert outliers(ramp, *every(50), 0.2)[1] < 1e-3
    assert int(outliers(spike, *every(50), 0.2)[0].argmax()) == 23


@pytest.mark.parametrize("states", [drawn(1, 1, 9, 2, seed=0), torch.zeros(1, 1, 9, 2)])
def test_of_all_frequencies_nothing_is_left(states: Tensor) -> None:
    deviation, rough = outliers(states, *every(9), 1.0)

    assert not deviation.any()
    assert not rough.any()


def scored(method: FlashCache, prompts: Layout, *, seed: int = 0, rough: float = 1.0) -> Tensor | None:
    """Scores of a layer; the same entries from the end, whatever the padding, which holds numbers, too."""
    smooth = torch.linspace(0, 3, 40)[:, None]
    keys, values = (smooth + rough * drawn(1, 2, 40, 4, seed=2 * seed + n) for n in (0, 1))
    batch, rows = prompts.shape
    keys, values = (x[:, :, -rows:].repeat(batch, 1, 1, 1) for x in (keys, values))
    keys = torch.where(prompts.valid[:, None, :, None], keys, 99.0)
    return method.score(0, keys, values, {}, prompts)


def planned(method: FlashCache, prompts: Layout, layers: int = 3) -> list[Kept | None]:
    scores = [scored(method, prompts, seed=layer, rough=0.2 + 0.3 * layer) for layer in range(layers)]
    return method.plan(scores, [prompts] * layers)


def entries(found: Kept | None, sample: int = 0) -> list[int]:
    assert found is not None
    return [entry for entry in found.entries[sample, 0].tolist() if entry >= 0]


def test_budgets_of_the_hand_example() -> None:
    prompt, deviation = layout("t" * 8), torch.rand(1, 8, generator=torch.Generator().manual_seed(0))
    scores = [torch.cat([torch.tensor([[share]]), deviation], dim=1) for share in (0.6, 0.2)]
    plans = FlashCache(keep=0.25).plan(scores, [prompt] * 2)

    assert [len(entries(plan)) for plan in plans] == [3, 1]


@given(st.integers(1, 12) | st.floats(0.01, 0.95), st.sampled_from([0, 1, 3]), st.sampled_from(["all", "visual"]))
def test_the_budget_is_met_over_all_layers_and_what_must_stay_stays(keep: int | float, recent: int, tokens: Any) -> None:
    prompts = layout("tt111111111111tttt", "...t1111tt2222tttt")
    plans = planned(FlashCache(keep=keep, recent=recent, tokens=tokens), prompts)
    for sample in range(2):
        everything = prompts.valid[sample].nonzero()[:, 0].tolist()
        text = [row for row in everything if prompts.item[sample, row] < 0]
        fixed = text if tokens == "visual" else []
        there = len(everything) - len(fixed)
        budget = 3 * min(keep, there) if isinstance(keep, int) else max(round(3 * keep * there), 3)
        found = [everything if plan is None else entries(plan, sample) for plan in plans]

        assert sum(len(of) - len(fixed) for of in found) == budget
        for of in found:
            assert of == sorted(set(of))
            assert set(fixed) <= set(of)
            assert set(everything[len(everything) - min(max(recent, 1), budget // 3) :]) <= set(of)


@given(st.integers(0, 6), st.sampled_from([0.0, 0.2, 0.5]), st.sampled_from(["all", "visual"]))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(padding: int, gamma: float, tokens: Any) -> None:
    method = FlashCache(keep=0.4, gamma=gamma, tokens=tokens)
    short = "tt" + "1" * (12 - padding) + "tttt"
    together = planned(method, layout("." * padding + short, "tt" + "1" * 12 + "tttt"))

    for of, single in zip(together, planned(method, layout(short))):
        assert entries(of) == [entry + padding for entry in entries(single)]


def test_rough_layers_keep_more() -> None:
    counts = [len(entries(plan)) for plan in planned(FlashCache(keep=0.3), layout("t" * 40), layers=4)]

    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_without_any_high_frequency_all_layers_keep_as_many_and_the_first_of_all_entries() -> None:
    plans = planned(FlashCache(keep=0.5, gamma=1.0), layout("t" * 8), layers=2)

    assert [entries(plan) for plan in plans] == [[0, 1, 2, 7]] * 2


def test_the_whole_budget_leaves_the_cache_alone_and_so_does_a_prompt_without_what_may_go() -> None:
    assert planned(FlashCache(keep=1.0), layout("t1111tt")) == [None] * 3
    assert planned(FlashCache(keep=9), layout("t1111tt")) == [None] * 3
    assert planned(FlashCache(tokens="visual"), layout("ttttttt")) == [None] * 3


def test_a_prompt_that_ends_in_its_picture_keeps_its_last_entry() -> None:
    plans = planned(FlashCache(keep=1, tokens="visual"), layout("tt1111111"))

    assert [entries(plan) for plan in plans] == [[0, 1, 8]] * 3


@pytest.mark.parametrize(("parameter", "value"), [("keep", 0), ("gamma", 1.5), ("tokens", "text"), ("recent", -1)])
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"flashcache: {parameter}="):
        FlashCache(**{parameter: value})
