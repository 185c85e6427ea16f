"""Layers that run ahead: what they say is what the prompt says later, gradients are right, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import AutoModelForImageTextToText

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.recipe import Recipe, RecipeLike
from foveate.core.signal import Function, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.engine.session import attach
from foveate.ops.gradients import constant, recorded
from tests import pretend
from tests.suite.bodies import BODIES, ONE, RAGGED, Body
from tests.suite.conversation import generate, logits
from tests.suite.test_devices import halved, spread, there

LAYER = 3
HOSTS = [body for body in BODIES.values() if body.name != "qwen3_5"]
LLAVA = BODIES["llava-clip"]
FOUND: list[tuple[Tensor, Tensor]] = []


@dataclass(frozen=True)
class Foresight(Tokens):
    """Asks what will enter a layer, and later notes what does."""

    name = "foresight"
    title = "Foresight"
    group = "test"
    paper = "none"

    ask: Callable[[Callable[[Tensor], Tensor], Tensor, Layout], Tensor] = lambda through, x, layout: through(x)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        return (Site("sequence"), Site("decoder", LAYER))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        return (Function("through", LAYER),)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        if site.kind == "sequence":
            state.put("prefill", "foreseen", self.ask(seen[Function("through", LAYER)], x, layout), rows=True)
        else:
            valid = layout.valid[..., None]
            FOUND.append((state.get("prefill", "foreseen").detach() * valid, x * valid))
        return None


@pytest.fixture(autouse=True)
def _fresh() -> None:
    FOUND.clear()


def recipe(before: RecipeLike = "none", behind: RecipeLike = "none", **given: Any) -> Recipe:
    return Recipe((*Recipe.of(before).methods, Foresight(**given), *Recipe.of(behind).methods))


@pytest.mark.parametrize("before", ["none", "uniform(keep=6)", "folder(keep=6, form='features')"])
@pytest.mark.parametrize("body", HOSTS, ids=lambda body: body.name)
def test_what_is_foreseen_comes(body: Body, before: str) -> None:
    model = body.model()
    try:
        session = attach(model, recipe(before))
    except FoveateError:
        pytest.skip(f"{body.name} does not host {before}")
    with session:
        generate(model, body.inputs(RAGGED), 2)
    ((foreseen, came),) = FOUND

    assert_close(foreseen, came, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "qwen3_vl"])
def test_whatever_the_kernel(name: str, kernel: str) -> None:
    model = BODIES[name].model(attention=kernel)
    with attach(model, recipe("uniform(keep=6)")):
        generate(model, BODIES[name].inputs(RAGGED), 2)
    ((foreseen, came),) = FOUND

    assert_close(foreseen, came, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("owner", ["none", "snapkv(keep=0.5, window=4)", "mixkv(keep=0.5, window=4, host='adakv')"])
@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "llava_onevision"])
def test_behind_earlier_turns(name: str, owner: str) -> None:
    """The second picture comes on a cache that may be compressed; what is foreseen is not written to it."""
    body = BODIES[name]
    model, first, second = body.model(), body.inputs(ONE), body.inputs(ONE, seed=1)
    told = []
    for asking in (True, False):
        with attach(model, recipe(behind=owner, **({} if asking else {"ask": lambda through, x, layout: x}))):
            cache = model(**first, use_cache=True).past_key_values
            mask = torch.cat([first["attention_mask"], second["attention_mask"]], dim=1)
            told.append(model(**second | {"attention_mask": mask}, past_key_values=cache, use_cache=True).logits)
    foreseen, came = FOUND[1]

    assert_close(foreseen, came, rtol=1e-5, atol=1e-5)
    assert torch.equal(*told)


@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"])
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    body, checked = BODIES[name], []

    def ask(through: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
        with recorded():
            weights = torch.full(x.shape[:2], 0.9, dtype=x.dtype, requires_grad=True)
            rows, direction = constant(x), torch.linspace(-1, 1, x.shape[2], dtype=x.dtype)
            checked.append(
                torch.autograd.gradcheck(
                    lambda weights: through(rows * weights[..., None])[:, -1] @ direction,
                    weights,
                    eps=1e-2,  # norms compute in float32
                    atol=1e-3,
                    fast_mode=True,
                )
            )
        return through(x)

    model = body.model().double()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in body.inputs(RAGGED).items()}
    with attach(model, recipe(ask=ask)), torch.no_grad():
        model(**inputs)

    assert checked == [True]


def descend(through: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
    with recorded():
        weights = torch.ones(x.shape[:2], device=x.device, requires_grad=True)
        (gradient,) = torch.autograd.grad(through(constant(x) * weights[..., None])[:, -1].square().sum(), weights)
        assert bool(gradient.any())
    return gradient


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("body", HOSTS, ids=lambda body: body.name)
def test_whatever_mode_the_caller_is_in(body: Body, mode: Callable[[], AbstractContextManager[None]]) -> None:
    model, gradients = body.model(), []

    def ask(through: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
        gradients.append(descend(through, x, layout))
        return x

    with attach(model, recipe("uniform(keep=6)", ask=ask)):
        with mode():
            model(**body.inputs(RAGGED))
        with torch.no_grad():
            model(**body.inputs(RAGGED))

    assert_close(*gradients)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_nothing_is_left_behind_where_a_layer_fails() -> None:
    model, inputs = LLAVA.model(), LLAVA.inputs(ONE)
    plain, mlp, calls = logits(generate(model, inputs, 3)), model.model.language_model.layers[1].mlp, []

    def fail(module: Any, args: Any) -> None:
        calls.append(torch.is_grad_enabled())
        if len(calls) == 1:
            raise RuntimeError("out of memory")

    handle = mlp.register_forward_pre_hook(fail)
    with attach(model, recipe(ask=descend)):
        with pytest.raises(RuntimeError, match="out of memory"), torch.no_grad():
            model(**inputs)
        assert calls == [True]
        assert not torch.is_inference_mode_enabled()
        FOUND.clear()
        assert_close(logits(generate(model, inputs, 3)), plain)
    handle.remove()

    assert torch.equal(logits(generate(model, inputs, 3)), plain)
    assert all(weight.grad is None and weight.requires_grad for weight in model.parameters())


def test_threads_do_not_meet() -> None:
    model = LLAVA.model()
    inputs = [LLAVA.inputs(ONE, seed=seed) for seed in range(4)]
    with attach(model, recipe(ask=lambda through, x, layout: descend(through, x, layout)[..., None] * x)):
        alone = [logits(generate(model, each, 3)) for each in inputs]
        foreseen = [each for each, _ in FOUND]
        FOUND.clear()
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda each: logits(generate(model, each, 3)), inputs))

    assert all(torch.equal(one, other) for one, other in zip(alone, together))
    assert all(any(torch.equal(one, other) for other, _ in FOUND) for one in foreseen)


def test_other_methods_neither_act_nor_watch_there() -> None:
    """Signals are of the prompt itself, and no experts are weighed, whatever ran before."""
    model, inputs = LLAVA.model(), LLAVA.inputs(RAGGED)
    told = []
    for before in ("none", recipe()):
        whole = (*Recipe.of(before).methods, *Recipe.of("fastv(keep=6) + snapkv(keep=0.5, window=4)").methods)
        with attach(model, Recipe(whole)):
            told.append(logits(generate(model, inputs, 4)))

    assert_close(*told)


def test_without_a_picture_nothing_runs_ahead() -> None:
    model, seen = LLAVA.model(), []
    with attach(model, recipe()):
        handle = model.model.language_model.layers[0].register_forward_pre_hook(lambda module, args: seen.append(module))
        model(input_ids=torch.tensor([[1, 20, 30]]))
    handle.remove()

    assert len(seen) == 1
    assert not FOUND


def test_a_layer_with_a_recurrent_state_is_refused() -> None:
    with pytest.raises(FoveateError, match=r"foresight: .*decoder layer 0.*recurrent"):
        attach(BODIES["qwen3_5"].model(), recipe())


@pytest.mark.parametrize("name", ["llava-clip", "gemma3", "qwen3_vl"])
def test_layers_on_two_devices(name: str) -> None:
    body, gradients = BODIES[name], []
    inputs = body.inputs(RAGGED)

    def ask(through: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
        gradients.append(descend(through, x, layout).cpu())
        return through(x)

    with torch.no_grad(), attach(body.model(attention="eager"), recipe(ask=ask)) as session:
        session.anatomy.model(**inputs)
    with pretend.Pretended(), torch.no_grad():
        model = halved(body.model(attention="eager"))
        with attach(model, recipe(ask=ask)):
            model(**there(inputs))

    assert_close(*gradients)
    for foreseen, came in FOUND:
        assert_close(foreseen.cpu(), came.cpu(), rtol=1e-5, atol=1e-5)


def test_layers_on_disk(tmp_path: Path) -> None:
    gradients, inputs = [], LLAVA.inputs(RAGGED)

    def ask(through: Callable[[Tensor], Tensor], x: Tensor, layout: Layout) -> Tensor:
        gradients.append(descend(through, x, layout))
        return through(x)

    LLAVA.model().save_pretrained(tmp_path / "model")
    whole = AutoModelForImageTextToText.from_pretrained(tmp_path / "model").eval()
    places = spread(whole, lambda number, count: "cpu" if number % 2 else "disk", "cpu")
    model = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", device_map=places, offload_folder=tmp_path / "disk"
    ).eval()
    for each in (whole, model):
        with torch.no_grad(), attach(each, recipe(ask=ask)):
            each(**inputs)

    assert_close(*gradients)
    for foreseen, came in FOUND:
        assert_close(foreseen, came, rtol=1e-5, atol=1e-5)
