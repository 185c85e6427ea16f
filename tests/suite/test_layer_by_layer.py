"""A cache that shrinks layer by layer, as the prompt passes: the same answers, and never all of it there at once."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

import foveate
from foveate.core.method import Method
from foveate.core.recipe import Recipe
from foveate.methods import H2O, MixKV, SnapKV
from tests import tiny
from tests.suite.bodies import BODIES, RAGGED, Body, Sample
from tests.suite.pairs import artifacts
from tests.suite.test_memory import Live, no_collector

SNAPKV = SnapKV(keep=0.4, window=4)
MIXKV = MixKV(keep=0.4, window=4)
HEAVY = H2O(keep=0.4)
LAYERS = 24


@pytest.mark.parametrize("samples", [[RAGGED[0]], RAGGED], ids=["one", "ragged"])
@pytest.mark.parametrize(
    "recipe",
    [
        SNAPKV,
        MIXKV,
        HEAVY,
        f"ivc_prune + {SNAPKV}",
        f"hidrop(late_entry=2, layer_list=(2,), keep_list=(6,), early_exit=4) + {MIXKV}",
        f"shortv(layers=(1, 2)) + {SNAPKV}",
        f"hiprune(keep=9) + fastv(layer=2, keep=5) + {MIXKV}",
    ],
    ids=str,
)
def test_answers_are_the_same_as_when_the_whole_prompt_is_read_first(recipe: Any, samples: list[Sample]) -> None:
    assert_same_answers(recipe, BODIES["llava-clip"], samples)


@pytest.mark.parametrize("method", [SNAPKV, MIXKV], ids=str)
@pytest.mark.parametrize("name", ["gemma3", "llava_next"])
def test_of_models_with_sliding_windows_and_with_tiles(name: str, method: Method) -> None:
    assert_same_answers(method, BODIES[name], RAGGED)


def assert_same_answers(recipe: Any, body: Body, samples: list[Sample]) -> None:
    at_once = two_turns(recipe, body, samples)
    with ExitStack() as stack:
        for kind in (SnapKV, MixKV, H2O):
            stack.enter_context(patch.object(kind, "layer_by_layer", False))
        afterwards = two_turns(recipe, body, samples)
    assert len(at_once) == 8
    assert all(map(torch.equal, at_once, afterwards))


def two_turns(recipe: Any, body: Body, samples: list[Sample]) -> list[Tensor]:
    """Logits of two turns and of a step behind each, and the bytes that layers hold then."""
    model, inputs = body.model(), body.inputs(samples)
    token, said = inputs["input_ids"][:, -1:], torch.arange(20, 32).expand(len(samples), -1)
    found, cache, mask = [], None, inputs["attention_mask"]
    with torch.no_grad(), foveate.attach(model, recipe, artifacts=artifacts(body)):
        for turn in (inputs, {"input_ids": token}, {"input_ids": said}, {"input_ids": token}):
            if cache is not None:
                mask = torch.cat([mask, torch.ones_like(turn["input_ids"])], dim=1)
            output = model(**(turn | {"attention_mask": mask}), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found += [output.logits[:, -1], torch.tensor([layer.nbytes for layer in cache.layers])]
    return found


@pytest.mark.parametrize("method", [SNAPKV, MIXKV], ids=str)
def test_a_deep_model_needs_less_memory_than_without_the_method(method: Method) -> None:
    model, ids = tiny.llava(grid=12, layers=LAYERS), torch.tensor([[1, *[tiny.IMAGE] * 144, *range(20, 60)]])
    inputs = {"input_ids": ids, "pixel_values": torch.zeros(1, 3, 96, 96)}

    def peak(recipe: Recipe | Method) -> int:
        with no_collector(), torch.no_grad(), foveate.attach(model, recipe), Live() as live:
            model(**inputs, logits_to_keep=1)
        return live.peak

    whole = 2 * 2 * 12 * 4 * ids.numel() * LAYERS  # keys and values of two heads
    assert peak(method) < peak(Recipe()) - whole / 4
