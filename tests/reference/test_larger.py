"""The larger shipped models load offline, answer, and are what their cards say."""

from __future__ import annotations

import json

import pytest

import foveate
from foveate import FoveateError, checkpoint, reference
from foveate.tasks import questions
from foveate_reference.training.evaluate import FLOORS, TAUGHT, answer

LARGER = [name for name in reference.MODELS if name != "reference"]
SAMPLE = 40
"""Questions; their standard error is about 0.06, hence the slack below the measured score."""


@pytest.fixture(scope="module", params=LARGER)
def shipped(request):
    return request.param, *reference.load(request.param)


def test_all_models_together_are_small():
    files = [file for name in reference.MODELS for file in reference.path(name).rglob("*")]
    assert sum(file.stat().st_size for file in files) < 60e6


def test_the_evaluation_covers_what_was_taught(shipped):
    name, model, _ = shipped
    report = reference.evaluation(reference.path(name))
    assert tuple(report) == TAUGHT[model.config.model_type]
    assert {task: entry["floor"] for task, entry in report.items()} == {task: FLOORS[task] for task in report}
    assert all(entry["below_floor"] == (entry["score"] < entry["floor"]) for entry in report.values())


def test_the_card_says_how_it_was_trained(shipped):
    name, _, _ = shipped
    stages = json.loads((reference.path(name) / "training.json").read_text())["stages"]
    card = (reference.path(name) / "README.md").read_text()
    assert stages
    assert all(f"| {stage['kind']} | {stage['steps']} |" in card for stage in stages)


def test_without_their_package_a_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(reference, "find_spec", lambda name: None)

    assert reference.path("reference").is_dir()
    with pytest.raises(FoveateError, match=r"^model='reference-tiles': is not installed; pip install foveate-reference "):
        checkpoint.load("reference-tiles", "cpu", "float32")


def test_other_names_are_refused_with_those_that_there_are():
    with pytest.raises(FoveateError, match=r"^model='reference-smol': must be reference, reference-tiles, reference-qwen; "):
        reference.load("reference-smol")


@pytest.mark.parametrize("task", ["attribute", "needle"])
def test_accuracy(shipped, task):
    name, model, processor = shipped
    asked = questions(task, SAMPLE, seed=11)
    right = sum(each.score(said) for each, said in zip(asked, answer(model, processor, asked), strict=True)) / SAMPLE
    assert right >= reference.evaluation(reference.path(name))[task]["score"] - 0.2


@pytest.mark.parametrize("name", LARGER)
def test_a_conversation_under_a_recipe_is_on_one_cache(name):
    """What a recipe that removes nothing answers in three turns is what the whole conversation, fed again, is answered."""
    loaded = checkpoint.load(name, "cpu", "float32")
    (asked,) = questions("dialogue", 1, seed=4)
    prompts = [turn.prompt for turn in asked.turns]
    with foveate.attach(loaded.model, "random(keep=1.0)"):
        said = loaded.converse(asked.images, prompts, asked.max_new_tokens)
    assert said == [text.strip() for text in answer(loaded.model, loaded.processor, [asked])[0]]
