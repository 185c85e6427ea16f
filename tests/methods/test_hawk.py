"""HAWK: the card's worked examples and invariants, whose heads' weights count, and calibration."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.signal import Function, Seen, Site
from foveate.core.state import State
from foveate.engine.calibrate import Calibration
from foveate.methods import Hawk
from foveate.methods.before_llm.hawk import instruction, matches, weighed
from foveate.ops.select import top_rows
from tests.methods.bodiless import LLAVA_7B, layout, traits
from tests.suite.bodies import BODIES, RAGGED

QWEN = Fingerprint("qwen2_5_vl", 28, 3584, 152064)
# Rows 0 and 1 ask, rows 2 to 4 are seen.
QUERY = torch.tensor([[[[1.0, 0], [0, 1], [0, 0], [0, 0], [0, 0]], [[1, 1], [1, -1], [0, 0], [0, 0], [0, 0]]]])
KEY = torch.tensor([[[[0.0, 0], [0, 0], [1, 0], [0, 1], [1, 1]], [[0, 0], [0, 0], [1, 0], [0, 1], [1, -1]]]])
VISUAL = torch.tensor([[False, False, True, True, True]])
WEIGHTS = torch.tensor([0.25, 0.75])


def scores(query: Tensor = QUERY, key: Tensor = KEY, weights: Tensor = WEIGHTS) -> Tensor:
    return weighed(matches(query, key, ~VISUAL), VISUAL, weights)


def test_the_worked_example() -> None:
    logits = matches(QUERY, KEY, ~VISUAL)[0, :, 2:]

    assert_close(logits, torch.tensor([[0.353553, 0.353553, 0.707107], [0.707107, 0.0, 0.707107]]), atol=1e-6, rtol=0)
    assert_close(scores()[0, 2:], torch.tensor([0.632392, 0.102062, 0.734454]), atol=1e-6, rtol=0)
    assert top_rows(scores(), VISUAL, (2,))[0, 2:].tolist() == [True, False, True]


def test_selection_of_the_worked_example() -> None:
    prompt = layout("tt11t1t1t")
    ranked = torch.zeros(1, 9).scatter(1, torch.tensor([[2, 3, 5, 7]]), torch.tensor([[0.1, 0.9, 0.8, 0.2]]))
    edit = prompt.keeping(top_rows(ranked, prompt.ordinal >= 0, (2,)), (2,))

    assert edit.reduction.anchor.tolist() == [[0, 1, 3, 4, 5, 6, 8]]


def test_lengths_do_not_matter() -> None:
    length = torch.tensor([3.0, 0.2])[:, None, None]

    assert_close(scores(QUERY * length), scores())
    assert_close(scores(key=KEY * length), scores())
    assert_close(scores(weights=7 * WEIGHTS), 7 * scores())


@pytest.mark.parametrize(
    ("skip", "tail", "asking"), [(0, 0, "ttttt"), (1, 2, ".tt.."), (1, 4, ".tttt"), (5, 0, "ttttt"), (1, 9, ".tttt")]
)
def test_who_asks(skip: int, tail: int, asking: str) -> None:
    found = instruction(layout("t11ttttt").question, skip, tail)

    assert found[0, 3:].tolist() == [letter == "t" for letter in asking]
    assert not found[0, :3].any()


def test_all_pictures_are_one_pool_and_shares_are_rounded_up() -> None:
    prompt = layout("t111t2222tt")
    x = torch.randn(1, 11, 4, generator=torch.Generator().manual_seed(0))
    seen: Seen = {Function("query_key", 0): lambda x, layout, rope: (x[:, None], x[:, None])}
    edit = Hawk(keep=0.3, weights=()).edit(Site("sequence"), x, prompt, seen, State())
    assert edit is not None

    assert prompt.after(edit).visual == (3,)
    assert torch.equal(prompt.after(edit).positions[0, 0], prompt.after(edit).origin[0])


def test_whose_weights_count() -> None:
    known = Artifact("hawk", LLAVA_7B, {"weights": [0.5, 0.5]})
    qwen = Hawk().fitted(traits(QWEN, rotary_rows=3, heads=28))

    assert qwen.weights is not None
    assert (len(qwen.weights), sum(qwen.weights), qwen.skip, qwen.tail) == (28, pytest.approx(1.2616), 1, 5)
    assert Hawk().fitted(traits()).weights == ()
    assert Hawk().fitted(traits(artifacts={"hawk": known})).weights == (0.5, 0.5)
    assert Hawk(weights=()).fitted(traits(artifacts={"hawk": known})).weights == ()
    assert "must be one for each of the 32 heads" in str(Hawk(weights=(0.5, 0.5)).check(traits(heads=32)))


def test_calibration_finds_the_heads_that_matter() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    with torch.no_grad():  # the second head says nothing in any layer
        for layer in model.model.language_model.layers:
            width = layer.self_attn.head_dim
            layer.self_attn.o_proj.weight[:, width : 2 * width] = 0
    plain = model(**body.inputs(RAGGED)).logits
    weights = Hawk().calibrate(Calibration(model, [body.inputs(RAGGED)]))["weights"]

    assert len(weights) == model.config.text_config.num_attention_heads
    assert sum(weights) == pytest.approx(1)
    assert weights[1] == pytest.approx(0, abs=1e-9)
    assert min(weights[:1] + weights[2:]) > 1e-6
    assert torch.equal(model(**body.inputs(RAGGED)).logits, plain)


def test_a_head_that_cannot_be_taken_out_is_refused() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    attention = model.model.language_model.layers[1].self_attn
    attention.mixed = attention.o_proj
    del attention.o_proj

    with pytest.raises(FoveateError, match="decoder layer 1: its attention has no output projection"):
        Calibration(model, [body.inputs(RAGGED)]).logits(Recipe(), without_head=0)
