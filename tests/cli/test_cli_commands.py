"""The commands as a user calls them, on a model small enough for that."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tests.thirdparty import package

from foveate import reference
from foveate.bench import measure as measure_module
from foveate.bench.records import RATIOS
from foveate.core import registry
from foveate.engine.check import warn_untrained
from foveate.models import anatomy
from foveate.tasks import questions


@pytest.fixture
def bench(call: Any, tiny: Path, tmp_path: Path) -> Any:
    """Runs a bench on the tiny model into ``tmp_path / "out"``."""
    fixed = ["--model", tiny, "--tasks", "shape", "--n", 5, "--batch-size", 2, "--keep", 0.25, "--out", tmp_path / "out"]
    return lambda *options: call("bench", *fixed, *options)


def results(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "out" / "results.json").read_text())


def test_version_is_the_package_s(call: Any) -> None:
    assert call("--version").stdout.strip() == version("foveate")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["bench", "--help"], ["run", "-h"], ["reference"]])
def test_help_is_shown(call: Any, arguments: list[str]) -> None:
    result = call(*arguments)

    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: ")


def test_methods_are_listed_for_people(call: Any) -> None:
    text = call("methods").stdout

    assert all(name in text for name in registry.methods())
    assert "arXiv 2403.06764" in text
    assert re.search(r"hidrop .* training,", text)


def test_methods_are_listed_for_programs(call: Any) -> None:
    entries = {entry["name"]: entry for entry in json.loads(call("methods", "--json").stdout)}

    assert entries["fastv"]["protocol"] == ["Tokens"]
    assert entries["fastv"]["parameters"]["layer"] == 2
    assert entries["hidrop"]["trained"]
    assert not entries["fastv"]["trained"]
    assert set(entries) == set(registry.methods())


def test_the_matrix_shows_what_runs_where_and_why_not(call: Any) -> None:
    text = call("methods", "--matrix").stdout

    assert all(f" {name} " in text for name in registry.methods())
    assert re.search(r"^ snapkv [ ✓]+$", text, re.MULTILINE)
    (number,) = re.findall(r"^ scope .*?(\d+) ", text, re.MULTILINE)
    assert re.search(rf"^{number} +scope: needs a CLS token", text, re.MULTILINE)


def test_the_matrix_marks_what_needs_training(call: Any) -> None:
    text = call("methods", "--matrix").stdout

    assert "ppe †" in text
    assert "† needs training: its paper trains the model with it" in text


def test_one_method_is_explained_for_people(call: Any) -> None:
    text = " ".join(call("methods", "scope").stdout.split())

    for said in ("SCOPE (scope)", "When it helps", "saliency", "'cls' or 'received'", "with its defaults: llava", "not on"):
        assert said in text


def test_one_method_is_explained_for_programs(call: Any) -> None:
    entry = json.loads(call("methods", "scope", "--json").stdout)

    assert entry["place"] == "before the LLM"
    assert {one["name"] for one in entry["parameters"]} == {"keep", "alpha", "combine", "saliency", "positions"}
    assert all(one["meaning"] and one["values"] for one in entry["parameters"])
    assert {each["model"]: each["works"] for each in entry["models"]}["llava"]
    assert any("whole grids" in sentence for sentence in entry["combinations"])


def test_the_matrix_is_there_for_programs(call: Any) -> None:
    entries = json.loads(call("methods", "--matrix", "--json").stdout)

    assert {entry["method"] for entry in entries} == set(registry.methods())
    assert all(entry["works"] == (entry["reason"] is None) for entry in entries)


def test_the_matrix_of_one_model_knows_what_it_brings(call: Any, with_text_tower: Path) -> None:
    options = ["methods", "--matrix", "--json", "--model", with_text_tower]
    before = {entry["method"]: entry for entry in json.loads(call(*options).stdout)}
    call("calibrate", "shortv", "--model", with_text_tower, "--n", 1, "--out", with_text_tower / "foveate")
    after = {entry["method"]: entry for entry in json.loads(call(*options).stdout)}

    assert {entry["model"] for entry in before.values()} == {str(with_text_tower)}
    assert "foveate calibrate shortv" in before["shortv"]["reason"]
    assert after["shortv"]["works"]


def test_a_bench_writes_its_results_and_shows_them(bench: Any, tmp_path: Path) -> None:
    result = bench("--methods", "fastv,hiprune")

    assert result.exit_code == 0, result.output
    assert [(each["method"], each["keep"]) for each in results(tmp_path)] == [
        ("none", None),
        ("random", 0.25),
        ("uniform", 0.25),
        ("pool", 0.25),
        ("fastv", 0.25),
        ("hiprune", 0.25),
    ]
    assert "prefill" in result.stdout
    with Image.open(tmp_path / "out" / "quality_speed.png") as picture:
        picture.verify()


def test_tokens_and_evidence_are_what_the_methods_leave(bench: Any, tmp_path: Path) -> None:
    bench("--methods", "fastv")

    by_method = {each["method"]: each for each in results(tmp_path)}
    assert {name: each["visual_tokens"] for name, each in by_method.items()} == {
        "none": 144,
        "random": 36,
        "uniform": 36,
        "pool": 36,
        "fastv": 36,
    }
    assert by_method["none"]["evidence_recall"] == 1
    assert 0 < by_method["uniform"]["evidence_recall"] < 1
    assert by_method["none"]["kv_bytes"] > 2 * by_method["random"]["kv_bytes"]


def test_conversations_cost_what_the_turn_with_the_pictures_does(bench: Any, tmp_path: Path) -> None:
    result = bench("--methods", "none", "--tasks", "dialogue", "--keep", "0.5", "--n", "2")

    assert result.exit_code == 0, result.output
    by_method = {each["method"]: each for each in results(tmp_path)}
    assert by_method["random"]["visual_tokens"] == by_method["none"]["visual_tokens"] / 2


def test_costs_are_measured(bench: Any, tmp_path: Path) -> None:
    result = bench("--methods", "none")

    for each in results(tmp_path):
        assert 0 < each["prefill_seconds"] < each["first_token_seconds"] < each["total_seconds"]
        assert each["decode_seconds"] > 0
        assert each["efficiency"] > 0
        assert all(each[f"{name}_low"] <= each[name] <= each[f"{name}_high"] for name in RATIOS)
        assert (each["batch"], each["peak_bytes"]) == (2, None)  # on a CPU nobody counts it
    # The line goes on with the machine's name, however long that is.
    assert "5 questions a task in batches of 2" in " ".join(result.stdout.split())
    machine = json.loads((tmp_path / "out" / "settings.json").read_text())["machine"]
    assert machine["processor"] in " ".join(result.stdout.split())


def test_the_encoder_runs_in_every_batch_that_is_timed_for_both(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[int] = []
    load = measure_module.load

    def watched(*args: Any) -> Any:
        loaded = load(*args)
        anatomy(loaded.model).vision.register_forward_hook(lambda *_: encoded.append(1))
        return loaded

    monkeypatch.setattr(measure_module, "load", watched)
    bench("--methods", "none", "--timed", 2)

    # none, random, uniform, pool: a batch to warm up (and one of the unmodified model once), and two timed under both; the
    # third batch is encoded once for all.
    assert len(encoded) == 4 * (1 + 2 * 2) + 1 + 1


def test_answers_are_kept_question_by_question(bench: Any, tmp_path: Path) -> None:
    bench("--methods", "none")

    kept = json.loads((tmp_path / "out" / "cells" / "shape.none.all.json").read_text())["answers"]
    asked = questions("shape", 5, seed=0)
    assert [(each["prompt"], each["answer"]) for each in kept] == [(q.prompt, q.answer) for q in asked]


def test_resume_measures_only_what_is_missing(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("--methods", "none")
    before = results(tmp_path)
    measured = []

    def remember(loaded, encodings, settings, cell, questions, advance):
        measured.append(cell.method)
        return measure(loaded, encodings, settings, cell, questions, advance)

    measure = measure_module.measure
    monkeypatch.setattr(measure_module, "measure", remember)
    result = bench("--methods", "fastv", "--resume")

    assert result.exit_code == 0, result.output
    assert measured == ["fastv"]
    assert results(tmp_path)[:4] == before


@pytest.mark.parametrize(("options", "batches"), [((), 3), (("--timed", 1), 1)])
def test_timed_batches(bench: Any, monkeypatch: pytest.MonkeyPatch, options: tuple[Any, ...], batches: int) -> None:
    timed = []
    limit = measure_module.limit.prefill_seconds
    monkeypatch.setattr(measure_module.limit, "prefill_seconds", lambda *a, **kw: timed.append(a) or limit(*a, **kw))

    result = bench("--methods", "none", *options)

    assert result.exit_code == 0, result.output
    cells = 4  # none, random, uniform and pool
    assert len(timed) == cells * batches


def test_resume_with_nothing_missing_shows_the_table_again(bench: Any) -> None:
    first = bench("--methods", "none")

    assert bench("--methods", "none", "--resume").stdout == first.stdout


def test_resume_under_another_seed_is_refused(bench: Any) -> None:
    bench("--methods", "none")

    result = bench("--methods", "none", "--resume", "--seed", 1)

    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("foveate: seed=1: ")


def test_a_cell_that_fails_is_reported_and_the_others_are_shown(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = measure_module.measure

    def fail(loaded, encodings, settings, cell, questions, advance):
        if cell.method == "fastv":
            raise RuntimeError("out of memory")
        return measure(loaded, encodings, settings, cell, questions, advance)

    monkeypatch.setattr(measure_module, "measure", fail)
    result = bench("--methods", "fastv")

    assert result.exit_code == 1
    assert "failed: shape · fastv 0.25: RuntimeError: out of memory" in result.stderr
    assert [each["method"] for each in results(tmp_path)] == ["none", "random", "uniform", "pool"]
    assert "uniform" in result.stdout


def test_a_recipe_that_the_model_refuses_ends_a_bench_before_it_starts(bench: Any, tmp_path: Path) -> None:
    result = bench("--methods", "hiprune,fastv(layer=99)")

    assert result.exit_code == 2
    assert result.stderr.startswith("foveate: methods: fastv(layer=99, keep=0.25): layer=99: must be in 1..2")
    assert not (tmp_path / "out" / "settings.json").exists()


def test_all_methods_are_those_that_the_model_takes(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("random", "uniform", "downsample", "pool", "hiprune", "shortv")
    some = {name: kind for name, kind in registry.methods().items() if name in few}
    monkeypatch.setattr(registry, "methods", lambda: some)
    result = bench("--methods", "all")

    assert result.exit_code == 0, result.output
    assert "left out: shortv: no layer order is known" in result.stderr
    assert [each["method"] for each in results(tmp_path)] == ["none", "random", "uniform", "pool", "hiprune"]
    assert "left out: downsample(most=0.25): llava makes the same grid of every picture" in result.stderr
    again = bench("--methods", "all", "--resume")
    assert (again.exit_code, again.stdout) == (0, result.stdout)


@pytest.mark.parametrize("command", ["bench", "tune"])
@pytest.mark.parametrize("option", ["methods", "tasks"])
@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_list_is_an_error(call: Any, tiny: Path, tmp_path: Path, command: str, option: str, text: str) -> None:
    bound = ["--max-drop", 0.1] if command == "tune" else []
    result = call(command, *bound, "--model", tiny, f"--{option}", text, "--out", tmp_path / "out")

    assert result.exit_code == 2
    assert result.stderr.startswith(f"foveate: {option}=")
    assert not (tmp_path / "out").exists()


def test_a_task_that_the_reference_model_did_not_learn_is_marked(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(tiny, tmp_path / "own")
    floors = {"shape": {"below_floor": True}, "attribute": {"below_floor": False}}
    (own / "evaluation.json").write_text(json.dumps(floors))
    monkeypatch.setattr(reference, "path", lambda name="reference": own)

    options = ["--tasks", "shape,attribute", "--n", 1, "--methods", "none", "--keep", 0.1, "--out", tmp_path / "out"]
    result = call("bench", *options)

    assert result.exit_code == 0, result.output
    assert "shape · below floor · always" in result.stdout
    assert "attribute · always" in result.stdout


def test_run_answers_without_and_with_the_recipe(call: Any, tiny: Path, picture: Path) -> None:
    result = call("run", "--model", tiny, "--image", picture, "--prompt", "where is it?", "--recipe", "uniform(keep=16)")

    assert result.exit_code == 0, result.output
    assert "unmodified" in result.stdout
    assert "uniform(keep=16)" in result.stdout
    assert "144 → 16" in result.stdout


def test_run_shows_the_visual_tokens_of_every_layer(
    call: Any, tiny: Path, picture: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    recipe = "v2drop(layers=(1, 2), ratios=(0.5, 0.25))"
    result = call("run", "--model", tiny, "--image", picture, "--prompt", "what?", "--recipe", recipe, "--max-new-tokens", 2)

    assert result.exit_code == 0, result.output
    assert "144 → 144 (layer 0), 72 (layer 1), 18 (layer 2)" in result.stdout


def test_run_says_of_a_budget_above_what_is_there_that_it_changed_nothing(call: Any, tiny: Path, picture: Path) -> None:
    fixed = ["run", "--model", tiny, "--image", picture, "--prompt", "where is it?", "--max-new-tokens", 2, "--recipe"]

    generous, tight = call(*fixed, "uniform(keep=512)"), call(*fixed, "uniform(keep=16)")

    assert "uniform(keep=512) changed nothing of the prompt (144 visual tokens, no more than 144" in generous.stdout
    assert "changed nothing" not in tight.stdout


def test_a_method_that_needs_training_says_so_in_one_line(call: Any, tiny: Path, picture: Path) -> None:
    warn_untrained.cache_clear()

    result = call(
        "run",
        "--model",
        tiny,
        "--image",
        picture,
        "--prompt",
        "where?",
        "--recipe",
        "prumerge(keep=16)",
    )

    (line,) = result.stderr.splitlines()
    assert line.startswith("foveate: prumerge: needs training: the main results of its paper are of a model")


def test_run_takes_a_recipe_from_a_file(call: Any, tiny: Path, picture: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("- uniform: {keep: 16}\n")

    result = call("run", "--model", tiny, "--image", picture, "--prompt", "where is it?", "--recipe", recipe)

    assert "144 → 16" in result.stdout


def test_run_without_a_recipe_shows_the_model_as_it_is(call: Any, tiny: Path, picture: Path) -> None:
    result = call("run", "--model", tiny, "--image", picture, "--prompt", "where is it?")

    assert result.exit_code == 0, result.output
    assert "144 → 144" in result.stdout


def test_run_takes_a_text_tower_beside_the_model(call: Any, tiny: Path, tiny_clip: Path, picture: Path) -> None:
    asked = ["--image", picture, "--prompt", "where is it?", "--recipe", "cdpruner(keep=16, relevance='clip')"]
    without = call("run", "--model", tiny, *asked)
    result = call("run", "--model", tiny, *asked, "--companion", tiny_clip)

    assert without.exit_code == 2
    assert "needs a companion" in without.stderr
    assert result.exit_code == 0, result.output
    assert "144 → 16" in result.stdout


def test_bench_takes_a_text_tower_beside_the_model(bench: Any, tiny_clip: Path, tmp_path: Path) -> None:
    result = bench("--methods", "cdpruner(relevance='clip')", "--companion", tiny_clip)

    assert result.exit_code == 0, result.output
    assert results(tmp_path)[-1]["visual_tokens"] == 36
    other = bench("--methods", "none", "--resume")
    assert other.exit_code == 2
    assert other.stderr.startswith("foveate: companion=None: ")


def test_bench_finds_the_text_tower_in_the_model_s_folder(bench: Any, with_text_tower: Path, tmp_path: Path) -> None:
    result = bench("--methods", "cdpruner(relevance='clip')", "--model", with_text_tower)

    assert result.exit_code == 0, result.output
    assert results(tmp_path)[-1]["visual_tokens"] == 36


def test_a_broken_package_is_named_in_one_line_and_the_rest_works(tmp_path: Path) -> None:
    package(tmp_path, "bad_luck", "import an_old_library")
    done = subprocess.run(
        [sys.executable, "-c", "from foveate.cli import main; main()", "methods", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )

    assert {entry["name"] for entry in json.loads(done.stdout)} == set(registry.methods())
    (line,) = done.stderr.splitlines()
    assert line.startswith("package 'bad-luck': its methods are missing, 'bad_luck:Mine' cannot be loaded")


@pytest.mark.parametrize("films", [True, False])
def test_a_bench_shows_methods_a_video_where_that_is_asked_for(call: Any, tiny: Path, tmp_path: Path, films: bool) -> None:
    options = ["--model", tiny, "--tasks", "events", "--n", 3, "--batch-size", 2, "--keep", 0.25, "--timed", 1]
    result = call("bench", *options, "--methods", "evs(rate=0.75),vidcom2", *["--films"] * films, "--out", tmp_path / "out")

    assert result.exit_code == 0, result.output
    found = {each["method"]: each for each in results(tmp_path)}
    tokens = {name: each["visual_tokens"] for name, each in found.items()}
    whole = 6 * 144
    assert tokens["evs(rate=0.75)"] == (whole / 4 if films else whole)
    assert tokens["vidcom2"] == tokens["random"] == tokens["uniform"] == whole / 4
    # What happened is told frame by frame.
    assert found["none"]["evidence_recall"] == 1.0
    assert 0 < found["vidcom2"]["evidence_recall"] < 1
    (cell,) = (tmp_path / "out" / "cells").glob("events.vidcom2.*.json")
    shown = json.loads(cell.read_text())["examples"][0]
    assert [[(view["rows"], view["columns"]) for view in picture["views"]] for picture in shown] == [[(12, 12)]] * 6
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["films"] is films


def test_films_are_for_videos(bench: Any) -> None:
    result = bench("--films")

    assert result.exit_code == 2
    assert result.stderr == "foveate: films: shape shows no video; --films is for --tasks events,moment,stream\n"
