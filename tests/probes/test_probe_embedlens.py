"""EmbedLens: words that tokens lie at, kinds of words, and tokens that go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.suite.bodies import BODIES, ONE, RAGGED, Body

import foveate
from foveate.bench.probes.embedlens import (
    Lens,
    Without,
    count_words,
    makeup,
)
from foveate.checkpoint import Checkpoint
from foveate.ops import vocabulary
from foveate.ops.vocabulary import Census, Vocabulary, Word, matching, usual_top_k
from foveate.tasks import questions

WORDS = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]])
TOKENS = torch.tensor([[2, 0.1], [0.1, 3], [-5, 1], [1, 1.01]])
each_body = pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)


class Bodily(Checkpoint):
    """A tiny model that sees its body's own pictures, whatever it is shown."""

    def inputs(self, pictures: Any, prompts: Any) -> dict[str, torch.Tensor]:
        return BODIES[self.name].inputs(RAGGED)


def nearest(tokens: torch.Tensor, words: torch.Tensor, top_k: int) -> torch.Tensor:
    return vocabulary.nearest(tokens, Vocabulary(words.__getitem__, len(words)), top_k)


def test_nearest_words_of_the_card() -> None:
    assert nearest(TOKENS, WORDS, 1)[:, 0].tolist() == [0, 1, 2, 1]
    assert [set(ids) for ids in nearest(TOKENS, WORDS, 2).tolist()] == [{0, 1}, {0, 1}, {1, 2}, {0, 1}]


@pytest.mark.parametrize(("top_k", "removed"), [(1, [False, True, False, True]), (2, [True] * 4)])
def test_a_token_matches_if_one_of_its_nearest_words_does(top_k: int, removed: list[bool]) -> None:
    assert matching(nearest(TOKENS, WORDS, top_k), (1,)).tolist() == removed


@given(st.floats(0.01, 1e4))
def test_length_does_not_matter(length: float) -> None:
    assert torch.equal(nearest(TOKENS * length, WORDS, 3), nearest(TOKENS, WORDS, 3))


def test_a_word_is_nearest_to_itself_wherever_it_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    words = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    whole = nearest(words, words, 3)
    monkeypatch.setattr("foveate.ops.vocabulary.AT_ONCE", 7)

    assert whole[:, 0].tolist() == list(range(50))
    assert torch.equal(nearest(words, words, 3), whole)


def test_a_census_knows_how_alike_the_tokens_of_different_pictures_are() -> None:
    pictures = torch.nn.functional.normalize(torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)), dim=-1)
    census = Census()
    for tokens in pictures:
        census.add(tokens * 7, torch.tensor([9, 9, 9, 2]))

    often, once = census.words
    pairs = [pictures[a, :3] @ pictures[b, :3].T for a in range(3) for b in range(3) if a != b]
    assert (often.id, often.share, often.pictures) == (9, 0.75, 1.0)
    assert often.cosine == pytest.approx(float(torch.stack(pairs).mean()), abs=1e-6)
    assert (once.id, once.share) == (2, 0.25)


def test_a_word_of_one_picture_is_alive() -> None:
    census = Census()
    census.add(torch.ones(2, 3), torch.tensor([4, 4]))
    census.add(torch.ones(2, 3), torch.tensor([5, 5]))

    assert [(word.pictures, word.cosine, word.kind) for word in census.words] == [(0.5, 0.0, "alive")] * 2


@pytest.mark.parametrize(
    ("pictures", "cosine", "kind"),
    [(1.0, 0.999, "sink"), (0.8, 0.999, "dead"), (1.0, 0.9, "dead"), (0.3, 0.9, "alive"), (1.0, 0.4, "alive")],
)
def test_words_of_nearly_all_pictures_are_no_news(pictures: float, cosine: float, kind: str) -> None:
    assert Word(0, 0.1, pictures, cosine).kind == kind


def test_a_token_near_both_is_a_sink() -> None:
    lens = Lens.of([Word(1, 0.4, 1.0, 0.999), Word(2, 0.3, 1.0, 0.8), Word(3, 0.3, 0.2, 0.1)], top_k=2)

    assert (lens.sinks, lens.dead) == ((1,), (2,))
    assert lens.kinds(torch.tensor([[1, 2], [2, 3], [3, 0]])).tolist() == [0, 1, 2]


def test_a_hundred_words_have_one_nearest() -> None:
    assert (usual_top_k(125), usual_top_k(32000)) == (1, 3)


@each_body
def test_tokens_are_sorted_on_any_model(body: Body) -> None:
    model = body.model()
    if body.name == "gemma3":  # its projector starts at zero
        torch.nn.init.normal_(model.model.multi_modal_projector.mm_input_projection_weight)
    checkpoint = Bodily(body.name, model, None)
    asked = questions("shape", 3, 0)

    words = count_words(checkpoint, asked, batch_size=3).words
    made = makeup(checkpoint, asked, Lens((words[0].id,), (), top_k=1), batch_size=3)

    assert sum(word.share for word in words) == pytest.approx(1)
    assert made.shares["sink"] == pytest.approx(words[0].share)
    assert made.cosines["dead"] is None
    sinks = made.cosines["sink"]
    assert sinks is not None
    assert len(sinks) == checkpoint.layers
    assert sinks[0] == pytest.approx(1)


@each_body
def test_just_the_matching_tokens_go(body: Body) -> None:
    checkpoint = Bodily(body.name, body.model(), None)
    asked = questions("shape", 3, 0)
    first = count_words(checkpoint, asked, batch_size=3).words[0]

    def alive(others: bool) -> list[list[set[int]]]:
        with foveate.attach(checkpoint.model, Without((first.id,), 1, others)) as session:
            checkpoint.model(**body.inputs(RAGGED))
        return [[set(item.tolist()) for item in sample] for sample in session.trace.alive(0)]

    left, instead = alive(False), alive(True)
    total = sum(len(sample) for sample in left) * body.views[0]
    kept = sum(len(item) for sample in left for item in sample)
    assert kept == pytest.approx((1 - first.share) * total)
    for mine, others in zip(left, instead):
        count = len(mine) * body.views[0]
        gone = count - sum(map(len, mine))
        # All the others, where there are fewer of them than what matched.
        assert sum(map(len, others)) == count - min(gone, count - gone)


def test_words_that_nothing_is_near_leave_the_model_alone() -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), body.inputs(ONE)
    plain = model(**inputs).logits
    with foveate.attach(model, Without((), 3)):
        assert torch.equal(model(**inputs).logits, plain)
