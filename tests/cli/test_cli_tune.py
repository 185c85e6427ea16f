"""The command, on a model small enough; its weights are random, so no recipe can make its answers worse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.cli.conftest import Call

from foveate import tasks
from foveate.core.recipe import Recipe
from foveate.tasks import files
from foveate.tune.answer import ModelAnswers, batches

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
    # Its weights are random.
    assert evidence["chance"]["score"] == 0
    assert "does no better than always saying the same" in result.stderr
    assert result.stdout.split("snapkv")[0].count("does no better than always saying the same") == 1
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
    assert cut.stderr.splitlines()[-1].startswith("foveate: interrupted; the finished trials are in")
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "out" / "trials.json").read_text())[: len(kept)] == kept


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Two questions about each of 12 pictures."""
    rows = []
    for number, each in enumerate(tasks.questions("shape", 12, seed=3)):
        each.image.save(tmp_path / f"{number}.png")
        rows += [{"image": f"{number}.png", "question": f"{each.prompt} {turn}", "answers": "star"} for turn in range(2)]
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


OWN = (
    "--rungs",
    "2,6",
    "--validate",
    "50",
    "--batch-size",
    "5",
    "--methods",
    "snapkv",
    "--trials",
    "4",
    "--max-drop",
    "0.1",
)


def test_a_tune_on_own_data(call: Call, tiny: Path, data: Path, tmp_path: Path) -> None:
    command = ("tune", "--model", tiny, "--target", "kv", *OWN, "--data", data, "--out", tmp_path / "out")
    result = call(*command)

    assert result.exit_code == 0, result.output
    evidence = json.loads((tmp_path / "out" / "evidence.json").read_text())
    assert evidence["settings"]["tasks"] == ["mine"]
    assert evidence["settings"]["data"] == str(data)
    assert 2 <= evidence["validation"][-1]["evidence"]["n"] <= 22
    data.write_text(data.read_text().replace("star", "moon"))
    assert "digest=" in call(*command, "--resume").stderr


def test_what_is_held_out_shows_other_pictures(data: Path) -> None:
    asked = tasks.read(data)
    searched, held = files.divide(asked, 1 / 3, seed=0)
    again, _ = files.divide(asked[::-1], 1 / 3, seed=0)
    other, _ = files.divide(asked, 1 / 3, seed=1)

    shown = [{each.images.sources[0] for each in part} for part in (searched, held)]
    assert shown[0].isdisjoint(shown[1])
    assert len(searched) + len(held) == 24
    assert {each.prompt for each in again} == {each.prompt for each in searched} != {each.prompt for each in other}


def test_data_with_one_picture_cannot_be_held_out(call: Call, tiny: Path, data: Path, tmp_path: Path) -> None:
    data.write_text("\n".join(data.read_text().splitlines()[:2]))
    result = call("tune", "--model", tiny, *OWN, "--data", data, "--out", tmp_path / "out")

    assert result.exit_code == 2
    assert "must have questions about more pictures" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ((), "give one bound"),
        (("--max-drop", "0.02", "--metric", "point"), "metric='point': must be one of exact"),
        (("--max-drop", "0.02", "--methods", ""), "methods='': names none"),
        (("--max-drop", "0.02", "--data", "mine.jsonl", "--tasks", "all"), "cannot be measured together with data="),
        (("--max-drop", "0.02", "--data", "nowhere.jsonl"), "no such file"),
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
    monkeypatch.setattr("foveate.cli.tune.find_spec", lambda name: None)

    result = call("tune", "--max-drop", "0.02")

    assert result.exit_code == 2
    assert result.stderr.strip() == "foveate: tune: needs Optuna; pip install 'foveate[tune]'"


def test_questions_of_one_shape_are_asked_together() -> None:
    asked = [*tasks.questions("attribute", 3, seed=0), *tasks.questions("shape", 2, seed=0)]

    assert list(batches(asked, 4)) == [[0, 1, 2, 3], [4]]
