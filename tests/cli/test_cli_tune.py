"""The command, on a model small enough; its weights are random, so no recipe can make its answers worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Call

from saccade import tasks
from saccade.core.recipe import Recipe
from saccade.tune.answer import ModelAnswers, batches

SMALL = ("--tasks", "attribute,shape", "--rungs", "2,6", "--validate", "5", "--batch-size", "2", "--methods", "snapkv")
"""A few questions, two at a time, and three methods: the baselines always take part."""


def test_a_tune_finds_a_recipe(call: Call, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    result = call("tune", "--model", tiny, "--max-drop", "0.1", "--target", "kv", *SMALL, "--trials", "5", "--out", out)

    assert result.exit_code == 0, result.output
    recipe = Recipe.load(out / "recipe.yaml")
    evidence = json.loads((out / "evidence.json").read_text())
    assert str(recipe) == evidence["recipe"] != "none"
    assert evidence["kept"] is True
    assert evidence["validation"][-1]["evidence"]["shares"]["kv"]["value"] < 1
    assert evidence["baselines"]
    assert str(recipe) in result.stdout
    assert "on held-out questions: 5 questions, drop 0.0" in result.stdout


def test_an_interrupted_tune_says_so_and_goes_on(
    call: Call,
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("tune", "--model", tiny, "--max-drop", "0.1", *SMALL, "--trials", "3", "--out", tmp_path / "out")
    ask = ModelAnswers._ask

    def stop(self: ModelAnswers, recipe: Recipe, *rest: object) -> object:
        if "uniform" in str(recipe):
            raise KeyboardInterrupt
        return ask(self, recipe, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(ModelAnswers, "_ask", stop)
        cut = call(*command)
    kept = json.loads((tmp_path / "out" / "trials.json").read_text())
    again = call(*command, "--resume")

    assert cut.exit_code == 130
    assert cut.stderr.splitlines()[-1].startswith("saccade: interrupted; the finished trials are in")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "out" / "trials.json").read_text())[: len(kept)] == kept


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one bound"),
        (("--max-drop", "0.02", "--max-kv", "0.3"), "give one bound"),
        (("--max-kv", "0.3", "--target", "prefill"), "target='prefill': goes with --max-drop"),
        (("--max-drop", "2"), "max-drop=2.0: must be in"),
        (("--max-drop", "0.02", "--target", "fun"), "target='fun': must be one of"),
        (("--max-drop", "0.02", "--rungs", "200,50"), "rungs='200,50': must be ascending"),
        (("--max-drop", "0.02", "--methods", "hiprun"), "did you mean 'hiprune'"),
        (("--max-drop", "0.02", "--hints", "nowhere"), "hints='nowhere': holds no probes.json"),
    ],
)
def test_mistakes_are_one_line(call: Call, tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    result = call("tune", *options, "--out", tmp_path / "out")

    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_without_optuna_one_line_says_what_to_install(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saccade.cli.tune.find_spec", lambda name: None)

    result = call("tune", "--max-drop", "0.02")

    assert result.exit_code == 2
    assert result.stderr.strip() == "saccade: tune: needs Optuna; pip install 'saccade[tune]'"


def test_questions_of_one_shape_are_asked_together() -> None:
    asked = [*tasks.questions("attribute", 3, seed=0), *tasks.questions("shape", 2, seed=0)]

    assert list(batches(asked, 4)) == [[0, 1, 2, 3], [4]]
