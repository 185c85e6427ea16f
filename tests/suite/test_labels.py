"""An answer that comes with its prompt, to be learned or measured, has no say in what is kept of the prompt."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.method import Cache, Method
from foveate.engine.intake import answers
from tests import tiny
from tests.suite.bodies import BODIES, RAGGED, Body, types
from tests.suite.conversation import generate, logits
from tests.suite.kept import kept
from tests.suite.pairs import HOSTED, artifacts, parts
from tests.suite.test_batches import double

hosted = pytest.mark.parametrize(("method", "body"), HOSTED)
LENGTHS = (3, 9, 0)
"""Tokens of each sample's answer; the last has none."""


def answered(body: Body, on: str) -> tuple[dict[str, Tensor], Tensor, list[range], list[int]]:
    """Prompts with answers, padded on one side; their labels; each sample's columns of the prompt, and its answer's end."""
    inputs = body.inputs(RAGGED)
    rows = [ids[there.bool()] for ids, there in zip(inputs["input_ids"], inputs["attention_mask"])]
    generator = torch.Generator().manual_seed(3)
    told = [torch.randint(11, tiny.VOCABULARY, (count,), generator=generator) for count in LENGTHS]
    width = max(len(row) + len(answer) for row, answer in zip(rows, told))
    shape = (len(rows), width)
    ids, mask, labels = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long), torch.full(shape, -100)
    prompts, ends = [], []
    for sample, (row, answer) in enumerate(zip(rows, told)):
        start = 0 if on == "right" else width - len(row) - len(answer)
        middle, end = start + len(row), start + len(row) + len(answer)
        ids[sample, start:end], mask[sample, start:end] = torch.cat([row, answer]), 1
        labels[sample, middle:end] = answer
        prompts.append(range(start, middle))
        ends.append(end)
    inputs = double(inputs | {"input_ids": ids, "attention_mask": mask})
    if body.type_key:
        inputs[body.type_key] = types(ids)
    if parts(body).rotary_rows == 1:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs, labels, prompts, ends


@hosted
def test_what_is_kept_of_a_prompt_is_the_same_with_and_without_its_answer(method: Method, body: Body) -> None:
    model = body.model().double()
    with torch.no_grad(), foveate.attach(model, method, artifacts=artifacts(body)) as session:
        alone = []
        for place in range(len(RAGGED)):
            inputs = double(body.inputs(RAGGED, only=place))
            output = model(**inputs, use_cache=True)
            alone.append(
                (kept(session, output.past_key_values, 0, range(inputs["input_ids"].shape[1])), output.logits[0, -1])
            )
        for side in ("left", "right"):
            inputs, labels, prompts, ends = answered(body, side)
            output = model(**inputs, labels=labels, use_cache=True)
            assert output.loss.isfinite()
            for sample, (prompt, end) in enumerate(zip(prompts, ends)):
                mine = kept(session, output.past_key_values, sample, prompt)
                assert mine == alone[sample][0], (side, sample)
                torch.testing.assert_close(output.logits[sample, prompt.stop - 1], alone[sample][1], rtol=1e-6, atol=1e-6)
                answer = range(prompt.stop, end)
                for layer in kept(session, output.past_key_values, sample, answer).held:
                    assert all(head == list(range(len(answer))) for head in layer)


@hosted
def test_what_was_generated_without_a_cache_has_no_say_in_what_is_kept(method: Method, body: Body) -> None:
    if isinstance(method, Cache):
        pytest.skip("without a cache there is nothing to keep")
    model, inputs, layers = body.model(), body.inputs(RAGGED), parts(body).traits().decoder_layers
    alive = []
    with foveate.attach(model, method, artifacts=artifacts(body)) as session:
        for steps in (1, 4):
            generate(model, inputs, steps, use_cache=False)
            alive.append([[one.tolist() for one in sample] for sample in session.trace.alive(layers)])
    assert alive[1] == alive[0]


@pytest.mark.parametrize("recipe", ["fastv(keep=6)", "feather", "cdpruner(keep=6, relevance='embedding')", "transprune"])
def test_answers_are_the_same_with_and_without_a_cache(recipe: str) -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model().double(), double(body.inputs(RAGGED))
    with foveate.attach(model, recipe):
        cached, plain = (logits(generate(model, inputs, 6, use_cache=use)) for use in (True, False))
    torch.testing.assert_close(plain, cached, rtol=1e-6, atol=1e-6)


def test_the_answer_begins_with_the_first_label_behind_the_last_picture() -> None:
    picture = [False, True, True, False, False, False, False]
    cases = {
        (-100, -100, -100, -100, 5, 6, 7): [0, 0, 0, 0, 1, 1, 1],
        (-100, -100, -100, 4, -100, 6, -100): [0, 0, 0, 1, 1, 1, 1],  # a later question is behind the first answer
        (1, -100, -100, -100, -100, 6, 7): [0, 0, 0, 0, 0, 1, 1],  # an answer before the picture belongs to the prompt
        (1, 2, 3, 4, 5, 6, 7): [0, 0, 0, 1, 1, 1, 1],  # whoever learns the question, too, may not look at it
    }
    labels, expected = torch.tensor(list(cases)), torch.tensor(list(cases.values())).bool()
    valid = torch.ones_like(expected)
    placeholder = torch.tensor(picture).expand_as(valid)

    found = answers(labels, placeholder, valid)
    assert found is not None
    assert torch.equal(found, expected)
    assert answers(labels[:1].masked_fill(valid[:1], -100), placeholder[:1], valid[:1]) is None


def test_a_sample_of_text_begins_with_its_prompt_and_padding_answers_nothing() -> None:
    labels = torch.tensor([[3, 4, 5, 6], [3, 4, 5, 6]])
    valid = torch.tensor([[False, True, True, True], [True, True, True, False]])

    found = answers(labels, torch.zeros_like(valid), valid)
    assert found is not None
    assert found.tolist() == [[False, False, True, True], [False, True, True, False]]
