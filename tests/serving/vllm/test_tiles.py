"""LLaVA-NeXT: each view has its own budget, line ends stay, and few pictures are encoded at a time."""

from __future__ import annotations

from dataclasses import replace

import pytest

from foveate import reference
from foveate.models.processors import read_processor
from foveate.tasks import SPINE, questions
from tests.serving.vllm.both import ask, attached, engine, same, stop, watch

# An engine of its own, and the fifth.
pytestmark = pytest.mark.slow
FOLDER = reference.path("reference-tiles")
RECIPE = "hiprune(keep=0.3)"
ASKED = [
    replace(each, images=tuple(image.resize(size) for image in each.images))
    for task, size in zip(SPINE, [(192, 192), (192, 96), (96, 192), (200, 150), (96, 96), (300, 100)])
    for each in questions(task, 2, seed=5)
]


@pytest.fixture(scope="module")
def llm():
    llm = engine(FOLDER, RECIPE, max_model_len=2048)
    yield llm
    stop(llm)


@pytest.fixture(scope="module")
def processor():
    return read_processor(FOLDER)


def test_answers_and_what_is_kept_are_those_of_transformers(llm, processor):
    kept = watch(llm)
    theirs = attached(FOLDER, RECIPE, ASKED)
    same(ask(llm, processor, ASKED), theirs, kept)
    assert {len(picture) for picture in kept} == {2}  # an overview and details


def test_few_pictures_are_encoded_at_a_time(llm, processor):
    shown = []

    def bound(model):
        model.pruner.most = 700
        plain = model.vision_tower.forward

        def forward(pixels, **kwargs):
            shown.append(len(pixels))
            return plain(pixels, **kwargs)

        model.vision_tower.forward = forward

    llm.apply_model(bound)
    fresh = [replace(each, images=tuple(image.rotate(180) for image in each.images)) for each in ASKED]
    same(ask(llm, processor, fresh), attached(FOLDER, RECIPE, fresh))
    # One picture has up to 732 tokens; two small ones may go together.
    assert max(shown) <= 6
    assert sum(shown) >= 3 * len(ASKED)
