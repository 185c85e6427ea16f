"""What a request costs the host: waits for the device, kernels to start, Python calls. Counts, not seconds.

Waits are counted on a pretended device; kernels and calls on the CPU, where attention is one kernel as it is on a GPU.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.core.method import Method
from foveate.core.recipe import Recipe
from tests import pretend, tiny
from tests.suite.bodies import BODIES, Body, Sample
from tests.suite.pairs import lent

STEPS = 3
"""Decode steps that are counted, behind one that is not."""
Waits = list[pretend.Wait]
Recipes = Recipe | Method | str | None
"""What may run; None is the unmodified model."""


@cache
def body(layers: int) -> Body:
    """A tiny LLaVA of so many encoder blocks and as many decoder layers."""
    build = partial(tiny.llava, blocks=layers, layers=layers)
    return replace(BODIES["llava-clip"], name=f"llava-{layers}", build=build)


def waits(layers: int, samples: Sequence[Sample], recipe: Recipes = None, steps: int = 1 + STEPS) -> tuple[Waits, Waits]:
    """While the prompt is read, and in the one with the most of so many decode steps, but for the first.

    Raises:
        FoveateError: if a model of so many layers cannot host the recipe.
    """
    with pretend.Pretended() as there:
        inputs = {name: value.to(pretend.device(0)) for name, value in _inputs(layers, samples).items()}
        prompt, *rest = _request(layers, recipe, elsewhere(layers), inputs, lambda: _collected(there.waits), steps)
    return prompt, max(rest[1:], key=len, default=[])


def turns(layers: int, recipe: Recipes, prompts: Sequence[dict[str, Tensor]]) -> list[Waits]:
    """While each turn of a conversation is read; pixels and ids of ``prompts``, without padding."""
    mask, cache, found = None, None, []
    with pretend.Pretended() as there, _attached(elsewhere(layers), layers, recipe) as model, torch.no_grad():
        for prompt in prompts:
            given = {name: value.to(pretend.device(0)) for name, value in prompt.items()}
            new = torch.ones_like(given["input_ids"])
            mask = new if mask is None else torch.cat([mask, new], dim=1)
            with _collected(there.waits) as waited:
                cache = model(**given, attention_mask=mask, past_key_values=cache, logits_to_keep=1).past_key_values
            found.append(waited)
    return found


def kernels(layers: int, samples: Sequence[Sample], recipe: Recipes = None) -> int:
    """Operators that start a kernel, in the decode step with the most."""
    return _most(layers, samples, recipe, _Kernels)


def calls(layers: int, samples: Sequence[Sample], recipe: Recipes = None) -> int:
    """Python functions called in the decode step with the most."""
    return _most(layers, samples, recipe, _Calls)


def _most(layers: int, samples: Sequence[Sample], recipe: Recipes, counting: Callable[[], _Kernels | _Calls]) -> int:
    _, *steps = _request(layers, recipe, _model(layers), _inputs(layers, samples), counting, 1 + STEPS)
    return max(step.count for step in steps[1:])


def _inputs(layers: int, samples: Sequence[Sample]) -> dict[str, Tensor]:
    inputs = body(layers).inputs(samples)
    if len(samples) == 1:
        del inputs["attention_mask"]  # which says nothing
    return inputs


def _request(
    layers: int, recipe: Recipes, model: Any, inputs: dict[str, Tensor], counting: Callable[[], Any], steps: int
) -> Iterator[Any]:
    """What is counted while the prompt is read, and in each decode step."""
    token, mask = inputs["input_ids"][:, -1:], inputs.get("attention_mask")
    with _attached(model, layers, recipe), torch.no_grad():
        with counting() as counted:
            cache = model(**inputs, logits_to_keep=1).past_key_values
        yield counted
        for _ in range(steps):
            grown = {}
            if mask is not None:
                grown["attention_mask"] = mask = torch.cat([mask, torch.ones_like(token)], dim=1)
            with counting() as counted:
                model(input_ids=token, past_key_values=cache, **grown)
            yield counted


@contextmanager
def _attached(model: Any, layers: int, recipe: Recipes) -> Iterator[Any]:
    with nullcontext() if recipe is None else foveate.attach(model, recipe, artifacts=lent(body(layers), model)):
        yield model


@contextmanager
def _collected(so_far: Waits) -> Iterator[Waits]:
    found: Waits = []
    before = len(so_far)
    yield found
    found += so_far[before:]


class _Kernels(TorchDispatchMode):
    """Counts operators that start a kernel: no views, no memory that is only set aside, no numbers of the host."""

    NONE = ("aten._unsafe_view.default", "aten.empty", "aten.new_empty", "aten.scalar_tensor", "aten._local_scalar_dense")
    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += not (function.is_view or str(function).startswith(self.NONE))
        return function(*args, **(kwargs or {}))


class _Calls:
    """Counts calls of Python functions."""

    count = 0

    def __enter__(self) -> _Calls:
        gc.disable()  # finalizers are calls, whenever they come
        sys.setprofile(self._called)
        return self

    def __exit__(self, *raised: Any) -> None:
        sys.setprofile(None)
        gc.enable()

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        self.count += event == "call"


@cache
def _model(layers: int) -> Any:
    return body(layers).model()


@cache
def elsewhere(layers: int) -> Any:
    """The same model on a pretended device."""
    model = body(layers).model()
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to(pretend.device(0)), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(pretend.device(0))
    return model
