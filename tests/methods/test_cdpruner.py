"""CDPruner: the card's hand example, both kinds of relevance, and who may read what."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from foveate.core.errors import FoveateError
from foveate.core.items import ItemBatch
from foveate.core.layout import Layout
from foveate.core.signal import Aligned, Question, Site
from foveate.core.state import State
from foveate.methods import CDPruner
from foveate.methods.before_llm.cdpruner import EPSILON, likeness, scaled, weighed
from foveate.ops.dpp import greedy_map
from tests.core.strategies import prompts
from tests.methods.bodiless import layout, traits

FEATURES = torch.tensor([[[1.0, 0.0], [0.96, 0.28], [0.0, 1.0], [0.6, 0.8]]])
COSINES = torch.tensor([[-0.30, -0.28, -0.20, -0.22]])
"""Of the card's four tokens with the text."""


def batch(
    x: Tensor, question: Tensor | None = None, aligned: Tensor | None = None, texts: Sequence[Tensor] = ()
) -> ItemBatch:
    images, count, width = x.shape
    return ItemBatch(
        rows=1,
        columns=count,
        ordinal=torch.arange(count).expand(images, -1),
        number=(0,) * images,
        seen={} if aligned is None else {Aligned(): aligned},
        x=x,
        question=torch.zeros(images, 1, width) if question is None else question,
        companion=tuple(texts),
        seed=0,
        device=x.device,
    )


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """Tokens ``[2, N, 6]``, question embeddings ``[2, 3, 6]``, budget."""
    count = draw(st.integers(2, 9))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    tokens = torch.randn(2, count, 6, generator=generator)
    return tokens, torch.randn(2, 3, 6, generator=generator), draw(st.integers(1, count))


def test_the_hand_example() -> None:
    relevance = scaled(-COSINES, EPSILON)
    order, gains = greedy_map(FEATURES, relevance, 2)

    assert_close(relevance, torch.tensor([[1.0, 0.8, 1e-5, 0.2]]), atol=2e-5, rtol=0)
    assert order.tolist() == [[0, 1]]
    assert_close(gains, torch.tensor([[1.0, 0.0502]]), atol=1e-4, rtol=0)


def test_the_hand_example_is_the_best_pair() -> None:
    relevance = scaled(-COSINES, EPSILON)[0].double()
    kernel = relevance[:, None] * (FEATURES[0] @ FEATURES[0].T).double() * relevance
    volumes = {pair: kernel[list(pair)][:, list(pair)].det().item() for pair in combinations(range(4), 2)}

    assert max(volumes, key=volumes.__getitem__) == (0, 1)


def test_a_companion_keeps_what_is_least_like_the_text() -> None:
    aligned = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    images = batch(torch.eye(3)[None], aligned=aligned, texts=[torch.tensor([[2.0, 0.0]])])

    assert CDPruner().select(images, 1).tolist() == [[2]]


def test_segments_of_a_long_question_count_alike() -> None:
    tokens = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    segments = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    each = torch.cat([torch.nn.functional.cosine_similarity(tokens, segment[None, None], dim=-1) for segment in segments])

    assert_close(likeness(tokens, [segments * torch.tensor([[1.0], [5.0], [9.0]])])[0], each.mean(0))


def test_embeddings_keep_what_is_most_like_the_question() -> None:
    question = torch.tensor([[[0.1, 0.0, 3.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]])
    images = batch(torch.eye(3)[None], question)

    assert CDPruner(weight=1.0).select(images, 1).tolist() == [[2]]
    assert CDPruner().select(images, 1).tolist() == [[2]]


def test_relevance_of_embeddings_enters_exponentially() -> None:
    relevance = torch.tensor([[0.0, 0.5, 1.0]])

    assert_close(weighed(relevance, 0.5), torch.tensor([[0.0, 0.25, 0.5]]).exp())
    assert torch.equal(weighed(relevance, 1.0), relevance)
    assert torch.equal(weighed(relevance, 0.0), torch.ones_like(relevance))


@given(problems())
def test_without_weight_the_question_does_not_matter(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, question, k = problem
    plain = greedy_map(tokens, torch.ones(tokens.shape[:2]), k)[0].sort(dim=1).values

    assert torch.equal(CDPruner(weight=0.0).select(batch(tokens, question), k), plain)


@given(problems())
def test_without_a_question_it_is_a_plain_dpp(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, question, k = problem
    plain = greedy_map(tokens, torch.ones(tokens.shape[:2]), k)[0].sort(dim=1).values

    assert torch.equal(CDPruner(weight=1.0).select(batch(tokens, question * 0), k), plain)


@given(problems())
def test_padding_of_the_question_counts_for_nothing(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, question, k = problem
    padded = torch.cat([torch.zeros(2, 4, 6), question], dim=1)

    assert torch.equal(CDPruner().select(batch(tokens, padded), k), CDPruner().select(batch(tokens, question), k))


@given(problems())
def test_an_image_is_chosen_from_as_if_it_were_alone(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, question, k = problem
    alone = [CDPruner().select(batch(tokens[i : i + 1], question[i : i + 1]), k) for i in range(2)]

    assert torch.equal(CDPruner().select(batch(tokens, question), k), torch.cat(alone))


@given(problems())
def test_kept_tokens_are_in_raster_order_without_repetition(problem: tuple[Tensor, Tensor, int]) -> None:
    tokens, question, k = problem
    texts = list(question)
    kept = CDPruner().select(batch(tokens, aligned=tokens, texts=texts), k)

    assert kept.shape == (2, k)
    assert kept.diff(dim=1).gt(0).all()


def test_equal_relevance_is_no_division_by_zero() -> None:
    assert torch.equal(scaled(torch.full((2, 3), 0.7), EPSILON), torch.ones(2, 3))


@given(prompts(), st.integers(1, 4), st.integers(0, 99))
def test_a_sample_keeps_in_a_batch_what_it_keeps_alone(before: Layout, keep: int, seed: int) -> None:
    x = torch.randn(*before.shape, 8, generator=torch.Generator().manual_seed(seed))
    together = CDPruner(keep=keep).edit(Site("sequence"), x, before, {}, State())
    after = before if together is None else before.after(together)

    for sample in range(before.shape[0]):
        own = slice(sample, sample + 1)
        alone = Layout.build(before.ordinal[own] >= 0, before.valid[own], before.positions[:, own], before.items[own])
        change = CDPruner(keep=keep).edit(Site("sequence"), x[own], alone, {}, State())
        one = alone if change is None else alone.after(change)
        assert after.origin[sample][after.valid[sample]].tolist() == one.origin[one.valid].tolist()


def test_the_question_is_the_text_behind_the_image() -> None:
    x = torch.zeros(1, 6, 3)
    x[0, :5] = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.5]])
    before = layout("t111tt")
    edit = CDPruner(keep=1).edit(Site("sequence"), x, before, {}, State())

    assert edit is not None
    assert before.after(edit).origin.tolist() == [[0, 3, 4, 5]]


def test_it_reads_the_companion_only_where_there_is_one() -> None:
    assert CDPruner().reads(traits(companion=True)) == (Aligned(), Question())
    assert CDPruner().reads(traits()) == ()
    assert CDPruner().reads(traits(companion=True, encoder_layers=None)) == ()
    assert CDPruner(relevance="embedding").reads(traits(companion=True)) == ()


def test_a_companion_that_is_not_there_is_refused_with_what_works_instead() -> None:
    reason = CDPruner(relevance="clip").check(traits())

    assert reason is not None
    assert "use relevance='embedding'" in reason
    assert CDPruner(relevance="clip").check(traits(companion=True)) is None
    assert CDPruner().check(traits()) is None


@pytest.mark.parametrize("wrong", [{"relevance": "text"}, {"weight": 1.5}, {"weight": -0.1}, {"keep": 0}])
def test_wrong_parameters_are_refused_by_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(FoveateError, match=rf"cdpruner: {next(iter(wrong))}="):
        CDPruner(**wrong)
