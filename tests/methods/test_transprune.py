"""TransPrune: the card's hand example and invariants."""

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
from foveate.core.roles import VISUAL
from foveate.core.signal import Function, Halves, Site
from foveate.core.state import State
from foveate.methods import TransPrune
from foveate.methods.in_llm.transprune import SUM, question_scores, share, transition
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits
from tests.methods.llama import random_query_key

X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
Y = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, -1.0]])
EVERY = torch.ones(1, 3, dtype=torch.bool)


def drawn(shape: tuple[int, int], seed: int) -> Tensor:
    return torch.randn(*shape, 4, generator=torch.Generator().manual_seed(seed))


def run(method: TransPrune, prompt: Layout, seed: int = 0) -> list[Layout]:
    """Layouts behind each site; every layer's tensors are drawn anew."""
    fit, state, layouts = method.fitted(traits()), State(), []
    full = prompt.shape
    for site in fit.sites(traits()):
        rows = prompt.origin.clamp(min=0)
        at = [torch.stack([t[o] for t, o in zip(drawn(full, seed + 9 * site.layer + i), rows)]) for i in range(5)]
        seen: dict[Any, Any] = {
            Halves(Site("decoder", site.layer - 1)): ((at[0], at[1]), (at[2], at[3])),
            Function("query_key", site.layer): random_query_key(4, seed=seed),
        }
        change = fit.edit(site, at[4], prompt, seen, state)
        if change is not None:
            prompt = prompt.after(change)
            state.compact(change.reduction)
        layouts.append(prompt)
    return layouts


def test_the_hand_example() -> None:
    value = transition(X[None], Y[None], EVERY)
    visual = torch.tensor([[False, True, True]])
    ttv, iga = share(value, visual), share(torch.tensor([[0.6, 0.3, 0.1]]), visual)

    assert_close(value, torch.tensor([[0.108327, 0.147232, 0.422290]]), atol=1e-6, rtol=0)
    assert_close(ttv[0, 1:], torch.tensor([0.258519, 0.741481]), atol=1e-6, rtol=0)
    assert_close((ttv + iga)[0, 1:], torch.tensor([1.008519, 0.991481]), atol=1e-6, rtol=0)


def test_a_module_that_says_nothing_changes_nothing() -> None:
    assert not transition(X[None], torch.zeros(1, 3, 2), EVERY).any()


@given(st.integers(0, 3), st.integers(0, 99))
def test_padding_neither_changes_nor_counts(padding: int, seed: int) -> None:
    x, y = drawn((1, 5), seed), drawn((1, 5), seed + 1)
    valid = torch.arange(5 + padding)[None] >= padding
    padded = [torch.nn.functional.pad(t, (0, 0, padding, 0)) for t in (x, y)]

    expected = torch.nn.functional.pad(transition(x, y, torch.ones(1, 5, dtype=torch.bool)), (padding, 0))
    assert_close(transition(*padded, valid), expected)


@given(prompts(), st.integers(0, 99))
def test_the_question_attends_causally(before: Layout, seed: int) -> None:
    query, key = random_query_key(4, seed=seed)(drawn(before.shape, seed), before)
    scores = question_scores(query, key, before.question_rows, before.valid)

    rows = before.shape[1]
    logits = (query @ key.repeat_interleave(2, dim=1).transpose(2, 3)) * 2**-0.5
    allowed = torch.ones(rows, rows, dtype=torch.bool).tril() & before.valid[:, None]
    map_ = logits.masked_fill(~allowed[:, None], float("-inf")).softmax(-1).mean(1)
    visual = before.rows(*VISUAL)
    for b in range(before.shape[0]):
        asking = before.question[b]
        if asking.any():
            assert_close(scores[b][visual[b]], map_[b][asking].mean(0)[visual[b]])
        else:
            assert not scores[b].any()


@given(prompts(), st.integers(0, 99))
def test_parts_sum_to_one_over_the_image(before: Layout, seed: int) -> None:
    visual = before.rows(*VISUAL)
    part = share(torch.rand(before.shape, generator=torch.Generator().manual_seed(seed)) + 0.1, visual)

    assert_close(part.sum(1), torch.tensor([float(count > 0) for count in before.visual]))
    assert not part[~visual].any()


def test_the_published_counts_and_positions_without_gaps() -> None:
    prompt = layout("t" * 5 + "1" * 576 + "t" * 3)
    after = [run(TransPrune(), prompt)[site] for site in (0, 2, 5)]  # behind layers 7, 9 and 12

    assert [one.visual for one in after] == [(504,), (360,), (72,)]
    for one in after:
        assert one.positions.tolist() == [[list(range(one.live[0]))]]


@given(prompts(text_last=True), st.integers(0, 99))
def test_counts_follow_the_original_count_and_text_stays(before: Layout, seed: int) -> None:
    method = TransPrune(layers=(2, 4), ratios=(0.7, 0.3))
    after = run(method, before, seed)

    assert after[0].visual == tuple(int(count * 0.7) for count in before.visual)
    assert after[-1].visual == tuple(int(count * 0.3) for count in before.visual)
    for b, (origin, valid) in enumerate(zip(after[-1].origin, after[-1].valid)):
        text = before.valid[b] & ~before.rows(*VISUAL)[b]
        assert set(text.nonzero().flatten().tolist()) <= set(origin[valid].tolist())


@given(prompts(rotary_rows=3))
def test_under_mrope_positions_stay(before: Layout) -> None:
    after = run(TransPrune(layers=(2,), ratios=(0.5,)), before)[-1]

    for b, (origin, valid) in enumerate(zip(after.origin, after.valid)):
        assert torch.equal(after.positions[:, b, valid], before.positions[:, b, origin[valid]])


@given(prompts(), st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(before: Layout, seed: int) -> None:
    method = TransPrune(layers=(2,), ratios=(0.5,), accumulate=(2,))
    x, y, h = (drawn(before.shape, seed + i) for i in range(3))

    def pruned(prompt: Layout, own: slice) -> Layout:
        seen: dict[Any, Any] = {
            Halves(Site("decoder", 1)): ((x[own], y[own]), (y[own], x[own])),
            Function("query_key", 2): random_query_key(4, seed=seed),
        }
        change = method.fitted(traits()).edit(Site("decoder", 2), h[own], prompt, seen, State())
        return prompt if change is None else prompt.after(change)

    after = pruned(before, slice(None))
    for b in range(before.shape[0]):
        own = slice(b, b + 1)
        alone = Layout.build(before.rows(*VISUAL)[own], before.valid[own], before.positions[:, own], before.items[own])
        one = pruned(alone, own)
        assert after.origin[b][after.valid[b]].tolist() == one.origin[one.valid].tolist()


def test_transitions_add_up_and_are_left_to_follow_the_rows() -> None:
    prompt, state = layout("t1111t"), State()
    method = TransPrune(layers=(3,), ratios=(0.5,), accumulate=(1, 2, 3))
    halves = ((drawn((1, 6), 0), drawn((1, 6), 1)), (drawn((1, 6), 2), drawn((1, 6), 3)))
    for layer in (1, 2):
        seen: dict[Any, Any] = {Halves(Site("decoder", layer - 1)): halves}
        assert method.edit(Site("decoder", layer), drawn((1, 6), 4), prompt, seen, state) is None

    twice = 2 * sum(transition(x, y, prompt.valid) for x, y in halves)
    assert_close(state.get("prefill", SUM), twice)
    state.compact(prompt.keeping(prompt.ordinal % 2 == 0, (2,)).reduction)
    assert_close(state.get("prefill", SUM), twice[:, [0, 1, 3, 5]])


def test_without_transitions_attention_decides() -> None:
    prompt, x = layout("t1111t"), drawn((1, 6), 0)
    method = TransPrune(layers=(2,), ratios=(0.25,), accumulate=()).fitted(traits())
    layer = random_query_key(4)
    change = method.edit(Site("decoder", 2), x, prompt, {Function("query_key", 2): layer}, State())
    assert change is not None

    scores = question_scores(*layer(x, prompt), prompt.question_rows, prompt.valid)
    assert prompt.after(change).origin.tolist() == [[0, 1 + int(scores[0, 1:5].argmax()), 5]]


def test_the_whole_ratio_and_text_alone_are_left_alone() -> None:
    assert all(one.live == (5,) for one in run(TransPrune(**TransPrune.identity_at), layout("t111t")))
    assert all(one.live == (5,) for one in run(TransPrune(), layout("ttttt")))


def test_it_reads_what_is_behind_each_layer() -> None:
    assert TransPrune().sites(traits()) == tuple(Site("decoder", layer) for layer in range(7, 13))
    halves = tuple(Halves(Site("decoder", layer)) for layer in range(6, 12))
    assert TransPrune().reads(traits()) == halves + tuple(Function("query_key", layer) for layer in (7, 9, 12))


def test_other_depths_have_the_same_shares() -> None:
    fit = TransPrune().fitted(traits(decoder_layers=4))

    assert (fit.layers, fit.accumulate) == ((1, 2, 3), (1, 2, 3))
    assert TransPrune().check(traits(decoder_layers=3)) == "layers=(1, 2, 3): must be in 1..2"
    refusal = TransPrune(accumulate=(11, 12, 13)).check(traits())
    assert refusal == "accumulate=(11, 12, 13): must not go on behind the last of layers=(7, 9, 12)"


def test_parameters_are_refused_by_name() -> None:
    for parameters in ({"ratios": (0.5,)}, {"ratios": (1.5, 1.0, 0.5)}, {"layers": (0, 1, 2)}, {"accumulate": (3, 3)}):
        (name,) = parameters
        with pytest.raises(FoveateError, match=f"^transprune: {name}="):
            TransPrune(**parameters)  # type: ignore[arg-type]
