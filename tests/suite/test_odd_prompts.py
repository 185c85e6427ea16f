"""Prompts at the edge: a picture with nothing before it, behind it or beside it, and no picture at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Method, Tokens, Traits
from foveate.core.recipe import Recipe
from foveate.core.reduction import Reduction
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from tests.suite.bodies import BODIES, Body, joined, types
from tests.suite.conversation import generate, logits
from tests.suite.oracle import noting
from tests.suite.pairs import HOSTED, artifacts, parts
from tests.suite.test_methods import CLOSE, oracle

hosted = pytest.mark.parametrize(("method", "body"), HOSTED)
PICTURE = -1
"""Stands for the placeholders of one."""
PROMPTS: dict[str, list[list[int]]] = {
    "ends in its picture": [[1, 20, 21, PICTURE]],
    "picture first": [[PICTURE, 20, 21, 22]],
    "picture alone": [[PICTURE]],
    "nothing between": [[1, PICTURE, PICTURE, 20]],
    "ends in the second picture": [[1, PICTURE, 22, PICTURE]],
    "one token": [[20]],
    "text": [[1, 20, 21, 22]],
    "batch": [[1, 20, PICTURE], [1, 20, 21], [PICTURE, 22, 23], [PICTURE]],
}


def prompted(body: Body, prompts: list[list[int]]) -> dict[str, Tensor]:
    """Left-padded model inputs."""
    pictures = [prompt.count(PICTURE) for prompt in prompts]
    rows = [[i for t in prompt for i in ([body.token] * body.placeholders() if t == PICTURE else [t])] for prompt in prompts]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    inputs = {"input_ids": ids, "attention_mask": mask}
    if body.type_key:
        inputs[body.type_key] = types(ids)
    if any(pictures):
        generator = torch.Generator().manual_seed(0)
        shown = [body.images([body.size] * count, generator) for count in pictures]
        inputs |= {key: joined([sample[key] for sample in shown]) for key in shown[0]}
    return inputs


@hosted
def test_every_odd_prompt_is_answered_by_a_row_that_ran_through_all_layers(method: Method, body: Body) -> None:
    model = body.model()
    for kind, prompts in PROMPTS.items():
        if kind == "nothing between" and body.type_key == "mm_token_type_ids":
            continue  # these families number positions by runs of placeholders, and fail by themselves
        inputs = prompted(body, prompts)
        with foveate.attach(model, method, artifacts=artifacts(body)):
            output = generate(model, inputs, 3)
        assert logits(output).isfinite().all(), kind
        if body.name != "gemma3":  # whose tiny projector is zero
            assert logits(output).any(-1).all(), kind


@hosted
@pytest.mark.parametrize("kind", ["ends in its picture", "ends in the second picture", "batch"])
def test_a_prompt_that_ends_in_its_picture_equals_its_oracle(method: Method, body: Body, kind: str) -> None:
    model, inputs = body.model(), prompted(body, PROMPTS[kind])
    prompt = inputs["input_ids"].shape[1]
    with noting() as notes, foveate.attach(model, method, artifacts=artifacts(body)) as session:
        output = generate(model, inputs, 4)
    whole = body.extended(inputs, output.sequences[:, prompt:-1])
    expected = oracle(model, whole, session, notes)
    # Where positions have several rows, the families' own generate numbers what follows a picture unlike their forward.
    steps = 1 if parts(body).rotary_rows > 1 else 4
    torch.testing.assert_close(logits(output)[:, :steps], expected[:, prompt - 1 :][:, :steps], **CLOSE)


@pytest.mark.parametrize("keep", [1, 5, 16])
@pytest.mark.parametrize("name", ["uniform", "hiprune", "fastv", "scope"])
def test_the_row_that_predicts_lives_within_the_budget(name: str, keep: int) -> None:
    body = BODIES["llava-clip"]
    model, inputs = body.model(), prompted(body, PROMPTS["ends in its picture"])
    with foveate.attach(model, f"{name}(keep={keep})") as session:
        model(**inputs)
    (alive,) = session.trace.alive(len(session.anatomy.layers))[0]
    assert len(alive) == keep
    assert alive[-1] == 15


class Loses(Tokens):
    """Drops all visual rows before the third layer, the one that predicts among them."""

    name = "loses"
    title = group = paper = ""

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site("decoder", 2),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit:
        return Edit(Reduction.keeping(layout.valid & (layout.item < 0)))


def test_a_method_that_does_away_with_the_row_that_predicts_is_refused_by_name() -> None:
    body = BODIES["llava-clip"]
    model: Any = body.model()
    with foveate.attach(model, Recipe((Loses(),))):
        model(**prompted(body, PROMPTS["picture first"]))
        with pytest.raises(FoveateError, match=r"input_ids: the prompt ends in its picture, [^\n]* loses does away [^\n]*$"):
            model(**prompted(body, PROMPTS["batch"]))
