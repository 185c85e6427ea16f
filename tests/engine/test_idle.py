"""A method that changes nothing is named in the report: a budget above what is there is no error, but no secret either."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

import foveate
from foveate.core.method import Method
from foveate.core.report import Report
from tests.suite.bodies import BODIES, ONE, Body
from tests.suite.conversation import generate
from tests.suite.pairs import HOSTED, lent

SIDE = {"omnizip_av": {"audio": torch.ones(8)}}
"""What a method does nothing without, by its name."""
BESIDES = {"dtr": {"steps": 0}, "h2o": {"steps": False}}
"""By name, what leaves out all that a method does beside keeping to its budget."""
HERE = [pair for pair in HOSTED if pair.values[1].name == "llava-clip"]
# Whether a picture has any background is for an untrained classifier to say; those of videos leave pictures alone.
AT_WORK = [pair for pair in HERE if pair.values[0].name not in ("index_preserving", "evs")]
WITH_BUDGET = [pair for pair in AT_WORK if any(field.name == "keep" for field in fields(pair.values[0]))]


def report(body: Body, *methods: Method) -> Report:
    model = body.model()
    side = {name: value for method in methods for name, value in SIDE.get(method.name, {}).items()}
    with foveate.attach(model, foveate.Recipe(methods), artifacts=lent(body, model)) as session, session.side(images=side):
        generate(model, body.inputs(ONE), 2)
        return session.report


@pytest.mark.parametrize(("method", "body"), AT_WORK)
def test_a_method_at_work_is_not_idle(method: Method, body: Body) -> None:
    assert report(body, method).idle == ()


@pytest.mark.parametrize(("method", "body"), WITH_BUDGET)
def test_a_budget_above_what_is_there_is_said_to_change_nothing(method: Method, body: Body) -> None:
    changes = {"keep": 10**6} | {name: None for name in ("ratios",) if hasattr(method, name)}
    if hasattr(method, "decode_keep"):
        changes["decode_keep"] = 10**6
    generous = replace(method, **changes, **BESIDES.get(method.name, {}))

    assert report(body, generous).idle == (str(generous),)


def test_of_a_recipe_the_one_that_does_nothing_is_named() -> None:
    body = BODIES["llava-clip"]
    recipe = foveate.Recipe.parse("hiprune(keep=64) + fastv(keep=4)")
    found = report(body, *recipe.methods)

    assert found.idle == ("hiprune(keep=64)",)
    assert found.largest_grid == 16
    assert "hiprune(keep=64) changed nothing of the prompt (16 visual tokens" in str(found)


def test_a_prompt_without_pictures_is_nobody_s_fault() -> None:
    body = BODIES["llava-clip"]
    model = body.model()
    inputs = body.inputs(ONE)
    text = inputs["input_ids"][:, -3:]
    with foveate.attach(model, "fastv") as session:
        model.generate(input_ids=text, max_new_tokens=2)
        assert session.report.idle == ()
