"""Pictures are encoded once where that changes nothing, and every time where a method looks on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.suite.bodies import BODIES, RAGGED
from tests.suite.conversation import generate, logits

import foveate
from foveate.bench.encodings import Encodings
from foveate.models import anatomy

FAMILIES = ["llava-clip", "llava_next", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3", "gemma3"]


class Watched:
    """A tiny model whose encoder counts its calls."""

    def __init__(self, name: str, room: int = 2**30) -> None:
        self.model = BODIES[name].model()
        self.calls = 0
        anatomy(self.model).vision.register_forward_hook(self._count)
        self.encodings = Encodings(self.model, room)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def answer(self, recipe: str, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        with foveate.attach(self.model, recipe, seed=1) as session, self.encodings.serve(session):
            return logits(generate(self.model, inputs, steps=3))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_the_same_and_the_encoder_runs_once(name: str) -> None:
    watched, inputs = Watched(name), BODIES[name].inputs(RAGGED)

    # Those at the projector's output write into what is given them.
    for recipe in ("none", "random(keep=5)", "none", "random(keep=0.5)"):
        anew = Watched(name).answer(recipe, inputs)
        torch.testing.assert_close(watched.answer(recipe, inputs), anew, rtol=0, atol=0)

    assert watched.calls == 1


def test_other_pictures_are_encoded() -> None:
    body, watched = BODIES["llava-clip"], Watched("llava-clip")
    one, other = body.inputs(RAGGED, seed=0), body.inputs(RAGGED, seed=1)

    first = watched.answer("none", one)

    assert not torch.equal(first, watched.answer("none", {**one, "pixel_values": other["pixel_values"]}))
    assert watched.calls == 2


@pytest.mark.parametrize("recipe", ["hiprune(keep=5)", "tome(r=2)", "prumerge(keep=5)"])
def test_a_method_that_looks_into_the_encoder_finds_it_running(recipe: str) -> None:
    watched, inputs = Watched("llava-clip"), BODIES["llava-clip"].inputs(RAGGED)

    watched.answer("none", inputs)
    watched.answer(recipe, inputs)

    assert watched.calls == 2


def test_another_task_begins_anew_and_what_finds_no_room_is_not_kept() -> None:
    inputs = BODIES["llava-clip"].inputs(RAGGED)
    roomy, full = Watched("llava-clip"), Watched("llava-clip", room=100)

    for task in ("shape", "shape", "counting"):
        for watched in (roomy, full):
            watched.encodings.about(task)
            watched.answer("none", inputs)

    assert (roomy.calls, full.calls) == (2, 3)


def test_outside_of_a_measurement_the_model_is_its_own() -> None:
    watched, inputs = Watched("llava-clip"), BODIES["llava-clip"].inputs(RAGGED)

    for _ in range(2):
        generate(watched.model, inputs, steps=1)

    assert watched.calls == 2
