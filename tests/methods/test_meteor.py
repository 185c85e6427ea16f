"""METEOR: the card's worked example and limiting cases of its last stage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import foveate
from foveate.core.signal import Attention
from foveate.methods.in_llm.meteor import from_text, votes
from tests.suite.bodies import BODIES, ONE, RAGGED

ATTENTION = torch.tensor([[[0.1, 0.3, 0.0, 0.2], [0.1, 0.0, 0.0, 0.0], [0.0, 0.1, 0.2, 0.0]]])


def test_the_worked_example() -> None:
    scores, paid = votes(ATTENTION, 2)

    assert round(10 * float(paid)) == 9
    assert_close(scores, torch.tensor([[0.1, 0.4, 0.2, 0.2]]))


def test_all_heads_vote_with_what_they_pay() -> None:
    scores, paid = votes(ATTENTION, 3)

    assert_close(scores, ATTENTION.sum(1))
    assert_close(paid, torch.tensor([1.0]))


def test_the_question_is_averaged_over_its_own_rows() -> None:
    logits = torch.full((1, 1, 3, 2), float("-inf"))
    logits[0, 0, 1:] = torch.tensor([[0.2, 0.4], [0.6, 0.1]]).log()
    asked = Attention(logits, torch.tensor([[[0.0, 0.0, 0.0]]]))

    assert_close(from_text(asked), torch.tensor([[[0.4, 0.25]]]))


def kept(recipe: str, samples: list[tuple[int, int, int]] = RAGGED) -> list[int]:
    body = BODIES["llava-clip"]
    with foveate.attach(body.model(), recipe) as session, torch.no_grad():
        session.anatomy.model(**body.inputs(samples))
    return [sum(map(len, of)) for of in session.trace.alive(session.anatomy.traits().decoder_layers)]


def test_no_attention_keeps_one_token_and_much_keeps_all() -> None:
    assert kept("meteor(factor=0.0)") == [1, 1, 1]
    assert kept("meteor(factor=1e9)") == [16, 32, 16]


@pytest.mark.parametrize("heads", [2, 0.5])
def test_what_stays_is_what_the_attention_of_the_plain_model_asks_for(heads: int | float) -> None:
    body = BODIES["llava-clip"]
    inputs, model = body.inputs(ONE), body.model(attention="eager")
    with torch.no_grad():
        row: Tensor = model(**inputs, output_attentions=True).attentions[1][0]
    shown = (inputs["input_ids"][0] == 7).nonzero()[:, 0]
    paid = row[:, int(shown[-1]) + 1 :, shown].mean(1)
    best = paid.sum(1).topk(2).indices

    assert kept(f"meteor(layer=2, factor=8.0, heads={heads})", ONE) == [round(8 * float(paid[best].sum()))]
