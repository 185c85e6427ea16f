"""A compiled model gives the recipe's answer, whenever it was compiled; after detach its own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import foveate
from tests.suite.bodies import BODIES, ONE

LLAVA = BODIES["llava-clip"]
RECIPES = [
    "hiprune(keep=6) + fastv(keep=4) + snapkv(keep=0.5, window=4)",
    *(pytest.param(recipe, marks=pytest.mark.slow) for recipe in ("none", "shortv(layers=(1,))", "tome(keep=6)")),
]
BACKENDS = ["eager", pytest.param("inductor", marks=pytest.mark.slow)]
CLOSE = dict(rtol=1e-4, atol=1e-4)


def forward(model: Any, backend: str) -> Any:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def whole(model: Any, backend: str) -> Any:
    return torch.compile(model, backend=backend)


def language_model(model: Any, backend: str) -> Any:
    model.model.language_model.compile(backend=backend)
    return model


def layer(model: Any, backend: str) -> Any:
    model.model.language_model.layers[1].compile(backend=backend)
    return model


def tower(model: Any, backend: str) -> Any:
    model.model.vision_tower.compile(backend=backend)
    return model


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [forward, whole, language_model, layer, tower])
@pytest.mark.parametrize("recipe", RECIPES)
def test_compiled_models_give_the_recipes_answer(recipe: str, compiled: Callable[..., Any], backend: str) -> None:
    inputs, told = LLAVA.inputs(ONE), []
    with torch.no_grad():
        plain = LLAVA.model()(**inputs).logits
        with foveate.attach(LLAVA.model(), recipe) as session:
            right = session.anatomy.model(**inputs).logits
        called = compiled(LLAVA.model(), backend)
        told.append((called(**inputs).logits, plain))
        with foveate.attach(called, recipe):
            told += [(called(**inputs).logits, right), (called(**inputs).logits, right)]
        told.append((called(**inputs).logits, plain))
    for found, expected in told:
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compiled", [forward, whole, language_model])
def test_models_may_be_compiled_while_attached(compiled: Callable[..., Any], backend: str) -> None:
    inputs, recipe = LLAVA.inputs(ONE), "hiprune(keep=6) + fastv(keep=4)"
    with torch.no_grad():
        with foveate.attach(LLAVA.model(), recipe) as session:
            right = session.anatomy.model(**inputs).logits
        with foveate.attach(LLAVA.model(), recipe) as session:
            called = compiled(session.anatomy.model, backend)
            torch.testing.assert_close(called(**inputs).logits, right, **CLOSE)


def test_a_layer_that_is_compiled_while_attached_is_refused() -> None:
    with foveate.attach(LLAVA.model(), "shortv(layers=(1,))") as session:
        model = layer(session.anatomy.model, "eager")
        with pytest.raises(foveate.FoveateError, match=r"decoder layer 1 was compiled while .*; compile it before"):
            model(**LLAVA.inputs(ONE))


def test_generate_runs_on_a_compiled_model() -> None:
    inputs, told = LLAVA.inputs(ONE), []
    for compiled in (lambda model, backend: model, forward):
        called = compiled(LLAVA.model(), "eager")
        with foveate.attach(called, "fastv(keep=4) + snapkv(keep=0.5, window=4)"):
            told.append(called.generate(**inputs, max_new_tokens=5, do_sample=False))
    assert torch.equal(*told)
