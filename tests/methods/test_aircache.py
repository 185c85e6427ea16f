"""AirCache: the card's words, scores and budgets, and what no budget may touch."""

from __future__ import annotations

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
from foveate.core.signal import Attention, Rows, Site
from foveate.methods import AirCache
from foveate.methods.kv_cache.aircache import elite, multipliers, relevance, skewness
from tests.methods.bodiless import layout, traits

LAST = [0.05, 0.45, 0.02, 0.48]
"""Attention of the card's last word to the four of the question."""
WORDS = torch.tensor([[4, 5, 6, 7]])
"""Their entries, behind four visual ones."""
HAND = torch.tensor([[0.4, 0.3, 0.1, 0.1]])


def example() -> Attention:
    """``[1, 1, 4, 8]`` rows of the four words over four visual entries and themselves; two of them are the card's."""
    rows = torch.full((4, 8), 0.1)
    rows[1] = torch.tensor([0.5, 0.2, 0.1, 0.1, 9.0, 0.1, 0.0, 0.0])
    rows[3, :4] = torch.tensor([0.3, 0.4, 0.1, 0.1])
    # Over the words themselves the row is the card's, scaled so that the elite's part makes the whole 1.
    rows[3, 4:] = torch.tensor(LAST) * 0.1 / (LAST[1] + LAST[3])
    return Attention(rows.log()[None, None], rows.sum(-1).log()[None, None])


def test_the_elite_of_the_hand_example() -> None:
    assert elite(example(), WORDS, 0.9).tolist() == [[False, True, False, True]]


def test_the_scores_of_the_hand_example() -> None:
    attention = example()
    visual = torch.arange(8)[None] < 4

    assert_close(relevance(attention, WORDS, elite(attention, WORDS, 0.9), visual)[:, :4], HAND)


def test_strength_and_skewness_of_the_hand_example() -> None:
    assert_close(HAND.sum(), torch.tensor(0.9))
    assert_close(skewness(HAND, torch.ones(1, 4, dtype=torch.bool)), torch.tensor([0.3704]), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("skew", "factors"), [([3.0, 1.0], [1.5, 0.5]), ([2.0, 2.0], [1.25, 0.75])])
def test_the_multipliers_of_the_hand_example(skew: list[float], factors: list[float]) -> None:
    found = multipliers(torch.tensor([[0.9], [0.3]]), torch.tensor(skew)[:, None], torch.ones(2, 1, dtype=torch.bool))

    assert_close(found[:, 0], torch.tensor(factors))


@pytest.mark.parametrize(("alpha", "words"), [(0.0, [0, 1, 2, 3]), (1.0, [3])])
def test_the_ends_of_alpha(alpha: float, words: list[int]) -> None:
    assert elite(example(), WORDS, alpha)[0].nonzero()[:, 0].tolist() == words


def test_by_the_whole_row_each_word_and_head_counts_by_what_it_gives_the_picture() -> None:
    attention = example()
    visual = torch.arange(8)[None] < 4
    chosen = elite(attention, WORDS, 0.9)
    whole = attention.probabilities()[:, 0, [1, 3]].mean(1).masked_fill(~visual, 0)

    assert_close(relevance(attention, WORDS, chosen, visual, "row"), whole)


@given(st.integers(3, 9), st.integers(0, 3), st.integers(0, 999))
def test_skewness_is_that_of_the_entries_alone(entries: int, padding: int, seed: int) -> None:
    x = torch.rand(1, padding + entries, generator=torch.Generator().manual_seed(seed))
    inside = (torch.arange(padding + entries) >= padding)[None]
    own = x[:, padding:].double()
    z = (own - own.mean()) / own.std()
    expected = entries / ((entries - 1) * (entries - 2)) * z.pow(3).sum()

    assert_close(skewness(x, inside), expected.float()[None], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("entries", [1, 2, 5])
def test_what_is_flat_or_too_short_has_no_skewness(entries: int) -> None:
    inside = torch.ones(1, entries, dtype=torch.bool)

    assert skewness(torch.full((1, entries), 0.1), inside).tolist() == [0]
    assert skewness(torch.zeros(1, entries), inside).tolist() == [0]


def test_layers_that_lean_to_the_left_and_such_as_see_nothing_do_not_turn_budgets_round() -> None:
    there = torch.ones(2, 1, dtype=torch.bool)

    assert_close(
        multipliers(torch.tensor([[0.5], [0.5]]), torch.tensor([[-1.0], [2.0]]), there), torch.tensor([[0.5], [1.5]])
    )
    assert multipliers(torch.zeros(2, 1), torch.full((2, 1), -1.0), there).tolist() == [[1], [1]]


def scored(method: AirCache, prompts: Layout, *, seed: int = 0, layer: int = 0, sharp: float = 1.0) -> Tensor | None:
    """Scores of a layer with two heads; the same rows from the end, whatever the padding. Attention is causal."""
    batch, rows = prompts.shape
    questions = int(prompts.question.sum(1).max())
    logits = sharp * torch.randn(batch, 2, 40, 40, generator=torch.Generator().manual_seed(seed))
    logits = logits.masked_fill(torch.ones(40, 40).triu(1).bool(), float("-inf"))[:, :, -questions:, -rows:]
    asked = torch.arange(questions) >= questions - prompts.question.sum(1, keepdim=True)
    hidden = ~prompts.valid[:, None, None] | ~asked[:, None, :, None]
    logits = logits.masked_fill(hidden, float("-inf"))
    lse = logits.logsumexp(-1).masked_fill(~asked[:, None], 0)
    stored = torch.zeros(batch, 2, rows, 4)
    seen = {Rows(Site("decoder", layer), "question", keys="cache"): Attention(logits, lse)}
    return method.score(layer, stored, stored, seen, prompts)


def planned(method: AirCache, prompts: Layout, layers: int = 3) -> list[Kept | None]:
    scores = [scored(method, prompts, seed=layer, layer=layer, sharp=1.0 + layer) for layer in range(layers)]
    return method.plan(scores, [prompts] * layers)


def entries(found: Kept | None, sample: int = 0) -> list[int]:
    assert found is not None
    return [entry for entry in found.entries[sample, 0].tolist() if entry >= 0]


@given(st.integers(1, 12) | st.floats(0.01, 0.99), st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_text_stays_and_the_budget_is_met_over_all_layers(keep: int | float, alpha: float) -> None:
    prompts = layout("tt111111111111tttt", "...t1111tt2222tttt")
    plans = planned(AirCache(keep=keep, alpha=alpha), prompts)
    for sample, (visual, total) in enumerate([(12, 36), (8, 24)]):
        text = set((prompts.valid & (prompts.item < 0))[sample].nonzero()[:, 0].tolist())
        everything = prompts.valid[sample].nonzero()[:, 0].tolist()
        found = [everything if plan is None else entries(plan, sample) for plan in plans]
        budget = min(keep, visual) * 3 if isinstance(keep, int) else max(round(keep * total), 3)

        assert all(text <= set(of) for of in found)
        assert all(of == sorted(set(of)) for of in found)
        assert sum(len(of) - len(text) for of in found) == budget


@given(st.integers(0, 6), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from(["elite", "row"]))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(padding: int, alpha: float, among: Any) -> None:
    method = AirCache(keep=0.4, alpha=alpha, among=among)
    short = "tt" + "1" * (12 - padding) + "tttt"
    together = planned(method, layout("." * padding + short, "tt" + "1" * 12 + "tttt"))
    alone = planned(method, layout(short))

    for of, single in zip(together, alone):
        assert entries(of) == [entry + padding for entry in entries(single)]


def test_questions_of_different_length_keep_what_they_keep_alone() -> None:
    method = AirCache(keep=0.4, alpha=0.5)
    together, alone = (
        planned(method, layout(*prompts)) for prompts in (("t11111111tt", "t11111tttttt"[1:]), ("t11111111tt",))
    )

    assert [entries(of) for of in together] == [entries(of) for of in alone]


def test_one_hot_entry_gets_its_layer_a_larger_budget() -> None:
    prompt = layout("1" * 20 + "t")
    flat, hot = torch.full((1, 21), 0.04), torch.full((1, 21), 0.01)
    hot[0, 7] = 0.61
    flat[0, -1] = hot[0, -1] = 0
    plans = AirCache(keep=0.25).plan([flat, hot], [prompt] * 2)

    assert [len(entries(plan)) - 1 for plan in plans] == [3, 7]
    assert 7 in entries(plans[1])


def test_layers_that_are_alike_keep_as_many() -> None:
    prompt = layout("t" + "1" * 20 + "ttt")
    scores = scored(AirCache(), prompt)
    plans = AirCache(keep=0.35).plan([scores] * 4, [prompt] * 4)

    assert [len(entries(plan)) for plan in plans] == [4 + 7] * 4


def test_layers_that_hold_less_are_asked_for_less() -> None:
    many, few = layout("1" * 12 + "tt"), layout("1" * 4 + "tt")
    plans = AirCache(keep=0.5).plan([torch.linspace(1, 0, prompt.shape[1])[None] for prompt in (many, few)], [many, few])

    assert sum(len(entries(plan)) - 2 for plan in plans) == 8


def test_the_whole_budget_leaves_the_cache_alone_and_so_does_a_prompt_without_pictures() -> None:
    assert planned(AirCache(keep=1.0), layout("t1111tt")) == [None] * 3
    assert planned(AirCache(keep=9), layout("t1111tt")) == [None] * 3
    assert planned(AirCache(), layout("ttttttt")) == [None] * 3


def test_a_prompt_that_ends_in_its_picture_keeps_its_last_entry() -> None:
    plans = planned(AirCache(keep=1), layout("tt1111111"))

    assert [entries(plan) for plan in plans] == [[0, 1, 8]] * 3


def test_it_reads_the_question_where_the_cache_is_full() -> None:
    signals = AirCache().reads(traits(sliding=(0, 2), decoder_layers=4))

    assert signals == tuple(Rows(Site("decoder", layer), "question", keys="cache") for layer in (1, 3))


@pytest.mark.parametrize(("parameter", "value"), [("keep", 0), ("alpha", 1.5), ("among", "all")])
def test_a_parameter_out_of_range_is_refused_by_name(parameter: str, value: Any) -> None:
    with pytest.raises(FoveateError, match=f"aircache: {parameter}="):
        AirCache(**{parameter: value})
