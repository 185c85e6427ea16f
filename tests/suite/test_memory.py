"""What a method holds beside the model: bounded by what it declares, and the declaration says something."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.core import registry
from foveate.core.method import Experts, Method, Pictures
from foveate.core.recipe import Recipe
from foveate.methods import ToMe
from foveate.models import anatomy
from tests import tiny
from tests.leaves import tensors
from tests.suite.bodies import BODIES
from tests.suite.pairs import lent, tier, variants

GRID = 12
LOOSEST = 8
"""A declaration may be so many times what was measured, and the engine's share on top."""
PASSED_THROUGH = {
    *(("foveate.engine.session", name) for name in ("_generate", "_features", "_outer", "_inner", "_block")),
    ("foveate.engine.session", "_layer"),
    *(("foveate.engine.call", name) for name in ("encode", "vision", "block", "projector", "model", "multimodal")),
    ("foveate.engine.call", "language_model"),
    ("foveate.engine.generation", "prefill"),
    ("foveate.engine.run", "through"),
    ("foveate.engine.decoding", "through"),
    ("foveate.engine.cache", "update"),
    ("foveate.engine.blocks", "forward"),
    ("foveate.engine.attention", "__call__"),
}
"""Functions of ours that call what the model would have called itself."""


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, of all and of those made on Foveate's account."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = self.ours = self.peak_ours = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tensors((args, kwargs))}
        for tensor in tensors(out):
            if id(storage := tensor.untyped_storage()) not in self._known | given:
                size, ours = storage.nbytes(), _on_our_account()
                self._known.add(id(storage))
                self._add(size, ours)
                weakref.finalize(storage, self._free, id(storage), size, ours)
        return out

    def _add(self, size: int, ours: bool) -> None:
        self.total += size
        self.ours += size * ours
        self.peak, self.peak_ours = max(self.peak, self.total), max(self.peak_ours, self.ours)

    def _free(self, key: int, size: int, ours: bool) -> None:
        self._known.discard(key)
        self._add(-size, ours)


def _on_our_account() -> bool:
    frame: Any = sys._getframe(2)
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("foveate.") and (module, frame.f_code.co_name) not in PASSED_THROUGH:
            return True
        frame = frame.f_back
    return False


@dataclass(frozen=True)
class Bytes:
    """Peaks of two requests, and what was declared."""

    peak: int
    ours: int
    workspace: int


@contextmanager
def no_collector() -> Iterator[None]:
    """What waits for the garbage collector counts."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def host(recipe: Recipe | Method) -> str:
    """The anatomy on which a recipe is measured."""
    return "qwen3_vl_moe" if isinstance(recipe, Experts) else "llava-clip"


def measure(recipe: Recipe | Method, samples: int, body: str | None = None) -> Bytes:
    body = body or host(recipe)
    model, inputs = model_and_inputs(samples, body)
    with no_collector(), foveate.attach(model, recipe, artifacts=lent(body, model)) as session, Live() as live:
        for _ in range(2):
            model.generate(**inputs, max_new_tokens=3, do_sample=False)
    return Bytes(live.peak, live.peak_ours, session.report.workspace)


@cache
def model_and_inputs(samples: int, body: str) -> tuple[Any, dict[str, Tensor]]:
    """A grid of 144 tokens (elsewhere than on LLaVA nine pictures), and prompts of different lengths."""
    if body != "llava-clip":
        return BODIES[body].model(), BODIES[body].inputs([(3, 9, 16 + 7 * sample) for sample in range(samples)])
    generator = torch.Generator().manual_seed(0)
    rows = []
    for sample in range(samples):
        words = torch.randint(11, tiny.VOCABULARY, (20 + 7 * sample,), generator=generator).tolist()
        rows.append([1, *words[:4], *[tiny.IMAGE] * GRID**2, *words[4:]])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    pixels = torch.randn(samples, 3, 8 * GRID, 8 * GRID, generator=generator)
    return tiny.llava(grid=GRID), {"input_ids": ids, "attention_mask": (ids > 0).long(), "pixel_values": pixels}


@cache
def unmodified(samples: int, body: str) -> Bytes:
    return measure(Recipe(), samples, body)


@cache
def baseline(samples: int, body: str) -> Bytes:
    """The engine's share."""
    return measure(registry.get("random")(keep=1.0), samples, body)


def _methods() -> list[Method]:
    """The suite's settings, and one that drops little: what is dropped makes room."""
    found = []
    for name, kind in registry.methods().items():
        if issubclass(kind, Pictures) or (name == "press" and find_spec("kvpress") is None):
            continue  # nothing of theirs is in a forward; its library is not here
        settings = variants(name)
        if kind.takes_budget():
            settings = [*settings, replace(settings[0], **{kind.budgeted: 0.9})]
        # Six of 144 are out of its reach.
        found += [replace(m, keep=0.4) if isinstance(m, ToMe) and m.keep == 6 else m for m in settings]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("samples", [pytest.param(1, marks=pytest.mark.slow), 2])
@pytest.mark.parametrize("method", map(tier, _methods()))
def test_a_method_needs_no_more_memory_than_it_declares(method: Method, samples: int) -> None:
    plain, found = unmodified(samples, host(method)), measure(method, samples)
    assert found.peak <= plain.peak + found.workspace
    assert found.ours <= found.workspace
    assert found.workspace <= LOOSEST * found.ours + baseline(samples, host(method)).workspace


def test_a_recipe_declares_the_sum_of_its_methods() -> None:
    parts = [registry.get("random")(keep=0.5), registry.get("snapkv")(keep=0.5)]
    together = measure(Recipe(tuple(parts)), 1)
    assert together.workspace == sum(measure(part, 1).workspace for part in parts)
    assert together.ours <= together.workspace


COMPOSED = ["none", "hiprune(keep=40) + fastv(keep=0.5) + snapkv", "tome(keep=0.4) + shortv(layers=(1,))"]


def _one_of_each() -> Iterator[Any]:
    """Compositions, and every method; in the first tier one of each group, as all that is let go is the engine's."""
    seen = set[str]()
    yield from map(Recipe.of, COMPOSED)
    for method in {type(method): method for method in _methods()}.values():
        yield pytest.param(method, marks=[pytest.mark.slow] if method.group in seen else [])
        seen.add(method.group)


everything = pytest.mark.parametrize("recipe", [*_one_of_each()], ids=str)


@everything
def test_nothing_but_ledgers_outlives_the_forward(recipe: Recipe | Method) -> None:
    left, pictures = _left_behind(recipe)
    assert left <= 3 * _left_behind(Recipe(), host(recipe))[0]
    assert pictures == 0


@everything
def test_while_decoding_a_session_holds_no_picture(recipe: Recipe | Method) -> None:
    model, inputs = model_and_inputs(1, host(recipe))
    expected = _held_in_steps(model, inputs)  # by generate itself, which hands its own arguments on
    with foveate.attach(model, recipe, artifacts=lent(host(recipe), model)):
        assert _held_in_steps(model, inputs) == expected


def _held_in_steps(model: Any, inputs: dict[str, Tensor]) -> list[int]:
    """Pictures, and what was made of them in the encoder and behind it, that are alive at each step of decoding."""
    held: list[int] = []

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["inputs_embeds"].shape[1] == 1:
            held.append(_live(made))

    inputs = {name: value.clone() for name, value in inputs.items()}
    with no_collector(), _features(model) as made:
        hook = model.model.language_model.register_forward_pre_hook(count, with_kwargs=True)
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        hook.remove()
    return held


def _left_behind(recipe: Recipe | Method, body: str | None = None) -> tuple[int, int]:
    """Bytes that are alive behind a forward, and pictures, or what was made of them in the encoder and behind it."""
    body = body or host(recipe)
    model, inputs = model_and_inputs(1, body)
    given = {name: value.clone() for name, value in inputs.items()}
    needed = lent(body, model)
    with no_collector(), foveate.attach(model, recipe, artifacts=needed), torch.no_grad(), _features(model) as made:
        made.append(weakref.ref(given["pixel_values"]))
        with Live() as live:
            model(**given)
            del given
            return live.total, _live(made)


@contextmanager
def _features(model: Any) -> Iterator[list[weakref.ref[Tensor]]]:
    """Collects what goes into the vision tower, and what comes out of its blocks and of the projector."""
    made: list[weakref.ref[Tensor]] = []

    def note(module: Any, args: Any, output: Any) -> None:
        made.append(weakref.ref(output[0] if isinstance(output, tuple) else output))

    parts = anatomy(model)
    assert parts.encoder is not None
    hooks = [module.register_forward_hook(note) for module in (*parts.encoder.blocks, parts.encoder.projector)]
    hooks.append(
        parts.vision.register_forward_pre_hook(lambda module, args: made.append(weakref.ref(args[0])) if args else None)
    )
    yield made
    for hook in hooks:
        hook.remove()


def _live(made: list[weakref.ref[Tensor]]) -> int:
    return sum(tensor() is not None for tensor in made)
