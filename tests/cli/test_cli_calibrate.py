"""Numbers that methods need, made on generated and on own pictures, into a folder that other commands take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tests.cli.test_cli_errors import assert_one_line
from tests.hub import write_checkpoint

import foveate
from foveate import checkpoint, reference
from foveate.cli import calibrate as calibrate_command
from foveate.cli.calibrate import CalibrateRequest, Marked, _marked_batches, marked_pictures
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.engine.calibrate import Calibration
from foveate.methods import IndexPreserving
from foveate.methods.before_encoder.index_preserving import cell_logits, dilated
from foveate.tasks import Question, Turn, questions


@pytest.fixture
def run(call: Any, tiny: Path, picture: Path) -> Any:
    """Asks the tiny model a question under a recipe."""
    asked = ["run", "--image", picture, "--prompt", "where is it?", "--max-new-tokens", 2]
    return lambda recipe, *options, model=tiny: call(*asked, "--model", model, "--recipe", recipe, *options)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve questions about eleven pictures, whose evidence is a box."""
    rows = []
    for number, each in enumerate(questions("shape", 11, seed=3)):
        each.image.save(tmp_path / f"{number}.png")
        rows.append(
            {"image": f"{number}.png", "question": each.prompt, "answers": each.answer, "evidence": [[8, 8, 32, 40]]}
        )
    rows.append({**rows[0], "evidence": [[48, 48, 96, 96]]})
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def test_numbers_are_written_where_they_are_asked_for_and_nowhere_else(
    call: Any, run: Any, tiny: Path, tmp_path: Path
) -> None:
    own, out = shutil.copytree(tiny, tmp_path / "own"), tmp_path / "new" / "out"
    before = sorted(own.rglob("*"))
    made = call("calibrate", "shortv", "--model", own, "--n", 1, "--out", out)

    assert made.exit_code == 0, made.output
    assert made.stdout.strip() == str(out / "shortv.json")
    assert made.stderr.strip().endswith(f"--artifacts {out}")
    assert sorted(own.rglob("*")) == before
    assert "run `foveate calibrate shortv`" in run("shortv", model=own).stderr
    assert run("shortv", "--artifacts", out, model=own).exit_code == 0


def test_the_matrix_and_a_bench_take_them_too(call: Any, tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert call("calibrate", "shortv", "--model", tiny, "--n", 1, "--out", out).exit_code == 0
    given = ["--model", tiny, "--artifacts", out]

    table = call("methods", "--matrix", "--json", *given)
    assert {entry["method"]: entry["works"] for entry in json.loads(table.stdout)}["shortv"]
    few = ["--tasks", "shape", "--n", 2, "--methods", "shortv", "--batch-size", 2, "--timed", 1, "--keep", 0.5]
    bench = call("bench", *given, *few, "--out", tmp_path / "bench")
    assert bench.exit_code == 0, bench.output
    assert json.loads((tmp_path / "bench" / "settings.json").read_text())["artifacts"] == str(out)
    other = call("bench", "--model", tiny, *few, "--out", tmp_path / "bench", "--resume")
    assert_one_line(other, "artifacts=None", "cannot be mixed")


def test_experts_are_weighed_on_own_answers_and_then_skipped(call: Any, run: Any, data: Path, tmp_path: Path) -> None:
    model, out = write_checkpoint("qwen3_vl_moe", tmp_path / "model"), tmp_path / "out"
    recipe = "modes(skip=0.5, points=4, reach_text=1.0, reach_vision=1.0)"
    made = call("calibrate", recipe, "--model", model, "--data", data, "--n", 3, "--batch-size", 2, "--out", out)

    assert made.exit_code == 0, made.output
    assert made.stdout.startswith("skipped ")
    numbers = Artifact.load(out / "modes.json").numbers
    tokenizer = checkpoint.load_processor(str(model)).tokenizer
    special = tokenizer.convert_tokens_to_ids(["<pad>", "</s>", "<|im_start|>", "<|im_end|>", "<|vision_start|>"])
    assert set(special) <= set(numbers["special"].tolist())
    assert run(recipe, "--artifacts", out, model=model).exit_code == 0
    refused = run("modes", "--artifacts", out, model=model)
    assert_one_line(refused, "artifact of modes: made with skip=0.5; use that, or calibrate it again with skip=0.6")
    given = ["--model", model, "--artifacts", out, "--tasks", "shape", "--n", 2, "--batch-size", 2, "--timed", 1]
    bench = call("bench", *given, "--methods", recipe, "--keep", 0.5, "--out", tmp_path / "bench")
    assert bench.exit_code == 0, bench.output
    loaded = checkpoint.load(str(model), "cpu", "float32", artifacts=out)
    with loaded.attach(recipe) as session:
        loaded.model(**loaded.inputs([[Image.linear_gradient("L").convert("RGB")]], ["what is it?"]))
    assert session.report.experts < 1


def test_attach_takes_the_folder(call: Any, tiny: Path, tmp_path: Path) -> None:
    call("calibrate", "shortv", "--model", tiny, "--n", 1, "--out", tmp_path / "out")
    model = checkpoint.load(str(tiny), "cpu", "float32").model

    with foveate.attach(model, "shortv", artifacts=tmp_path / "out") as session:
        assert str(session.recipe) == "shortv"
    for folder, message in (("absent", "no such folder"), (".", "holds none")):
        with pytest.raises(FoveateError, match=rf"artifacts=.*: {message}; name"):
            foveate.attach(model, "shortv", artifacts=tmp_path / folder)


def test_without_a_folder_they_lie_under_runs(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    made = call("calibrate", "prefixkv", "--model", tiny, "--n", 1)

    assert made.stdout.strip() == f"runs/calibrate/{tiny.name}/prefixkv.json"


def test_own_questions_make_other_numbers(call: Any, tiny: Path, data: Path, tmp_path: Path) -> None:
    def made(*options: Any) -> Any:
        result = call("calibrate", "mixkv", "--model", tiny, "--out", tmp_path / "out", *options)
        assert result.exit_code == 0, result.output
        return Artifact.load(tmp_path / "out" / "mixkv.json").numbers["redundancy"]

    generated, own, first = made("--n", 1), made("--data", data), made("--data", data, "--n", 1)

    assert not torch.equal(generated, own)
    assert not torch.equal(first, own)


@pytest.mark.parametrize(
    ("way", "fragments"),
    [
        ("file", ["out=", "cannot be written (Not a directory)"]),
        ("folder", ["holds a folder 'shortv.json', in the way"]),
        ("closed", ["out=", "cannot be written"]),
    ],
)
def test_a_write_that_will_fail_is_refused_before_the_work(
    call: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, fragments: list[str]
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("the model is loaded"))
    out = tmp_path / "out"
    if way == "file":
        out.touch()
        out /= "deeper"
    elif way == "folder":
        (out / "shortv.json").mkdir(parents=True)
    else:
        out = Path("/proc/none")

    assert_one_line(call("calibrate", "shortv", "--out", out), *fragments)


def test_an_interrupted_calibration_writes_nothing(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate_command, "make_artifact", stop)
    result = call("calibrate", "shortv", "--model", tiny, "--n", 1, "--out", tmp_path / "out")

    assert result.exit_code == 130
    assert result.stderr == "foveate: interrupted; nothing is written\n"
    assert not list((tmp_path / "out").iterdir())


def test_numbers_of_another_fine_tune_are_refused_until_they_are_made_anew(
    call: Any, run: Any, tiny: Path, tmp_path: Path
) -> None:
    own = shutil.copytree(tiny, tmp_path / "own")
    calibrate = ["calibrate", "prefixkv(start_size=2)", "--model", own, "--n", 1, "--out", own / "foveate"]
    made = call(*calibrate)
    weights = load_file(own / "model.safetensors")
    save_file({name: weight * 1.01 for name, weight in weights.items()}, own / "model.safetensors", {"format": "pt"})
    stale = run("prefixkv(search='offline', start_size=2)", model=own)
    again = call(*calibrate)

    assert made.exit_code == again.exit_code == 0, again.output
    assert stale.exit_code == 2
    assert "made on other weights" in stale.stderr
    assert "calibrate it again with start_size=1" in run("prefixkv(search='offline')", model=own).stderr
    assert run("prefixkv(search='offline', start_size=2)", model=own).exit_code == 0


@pytest.mark.parametrize("model", ["tiny", "reference-qwen"])
def test_a_cell_classifier_is_trained_on_own_pictures_for_any_model_that_hosts_it(
    call: Any, run: Any, tiny: Path, data: Path, tmp_path: Path, model: str
) -> None:
    named = tiny if model == "tiny" else model
    few = ["--data", data, "--out", tmp_path / "out", "--batch-size", 4]
    result = call("calibrate", "index_preserving(steps=30)", "--model", named, *few)

    assert result.exit_code == 0, result.output
    assert "accuracy" in result.stdout
    artifact = Artifact.load(tmp_path / "out" / "index_preserving.json")
    loaded = checkpoint.load(str(named), "cpu", "float32", artifacts=tmp_path / "out")
    assert loaded.traits.artifacts["index_preserving"].fingerprint == artifact.fingerprint
    assert IndexPreserving().check(loaded.traits) is None


def test_what_is_marked_is_where_the_model_sees_it(tiny: Path, tmp_path: Path) -> None:
    """The processor crops and resizes: the cells that are marked are those that show the mark's place."""
    loaded = checkpoint.load(str(tiny), "cpu", "float32")
    mask = np.zeros((200, 300), bool)
    mask[20:60, 110:150] = True
    shown = np.where(mask[..., None], 255, 30).astype(np.uint8).repeat(3, axis=2)
    asked = Question("own", [Image.fromarray(shown)], (Turn("?", ("",), [mask]),))
    request = CalibrateRequest("index_preserving", str(tiny), None, 1, None, 0, "cpu", "float32", 1)
    batches, marks = _marked_batches(loaded, [Marked([(asked, 0)])], request)

    ((cells, marked, _),) = Calibration(loaded.model, batches, marks).cells()

    bright = cells[..., : cells.shape[-1] // 3].amax(-1)
    assert torch.equal(marked, bright > (bright.min() + bright.max()) / 2)
    assert 0 < marked.sum() < marked.numel()


def test_all_evidence_of_a_picture_counts(tiny: Path, data: Path) -> None:
    request = CalibrateRequest("index_preserving", str(tiny), data, None, None, 0, "cpu", "float32", 4)
    pictures = marked_pictures(request)

    assert len(pictures) == 11
    assert [int((np.asarray(each.mark)[..., 0] > 0).sum()) for each in pictures[:2]] == [24 * 32 + 48 * 48, 24 * 32]


def test_the_shipped_classifier_does_what_its_numbers_say() -> None:
    shipped = Artifact.load(reference.path() / "foveate" / "index_preserving.json").numbers
    request = CalibrateRequest("index_preserving", "reference", None, 50, None, 1, "cpu", "float32", 50)
    loaded = checkpoint.load("reference", "cpu", "float32")
    ((cells, shown, layout),) = Calibration(
        loaded.model, *_marked_batches(loaded, marked_pictures(request), request)
    ).cells()

    found = cell_logits(cells, shipped) > 0
    assert (found == shown).float().mean().item() == pytest.approx(shipped["accuracy"], abs=0.02)
    assert dilated(found, layout)[shown].float().mean() > 0.99


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        (lambda rows: rows[:9], ["needs 10 pictures or more, and there are 9"]),
        (lambda rows: [{**row, "evidence": None} for row in rows], ["column 'evidence' is empty; index_preserving learns"]),
        (lambda rows: [{**row, "evidence": []} for row in rows], ["some cells, not in all or none"]),
        (lambda rows: [{**row, "image": "gone.png"} for row in rows], ["line 1", "gone.png", "no such file"]),
    ],
    ids=["few", "unknown", "nothing", "gone"],
)
def test_pictures_that_teach_nothing_are_refused(
    call: Any, tiny: Path, data: Path, tmp_path: Path, rows: Any, fragments: list[str]
) -> None:
    data.write_text("\n".join(map(json.dumps, rows([json.loads(line) for line in data.read_text().splitlines()]))))

    result = call("calibrate", "index_preserving", "--model", tiny, "--data", data, "--out", tmp_path / "out")
    assert_one_line(result, *fragments)
    assert not list((tmp_path / "out").iterdir())


def test_prompts_without_pictures_are_compared_by_their_answers(call: Any, run: Any, tiny: Path, tmp_path: Path) -> None:
    rows = [("is it red?", "harmful"), ("where is it?", "harmless"), ("what is it?", "harmful"), ("is it?", "harmless")]
    path = tmp_path / "prompts.csv"
    path.write_text("question,answers\n" + "".join(f"{asked},{kind}\n" for asked, kind in rows))
    out = tmp_path / "out"
    made = call("calibrate", "dtr", "--model", tiny, "--data", path, "--out", out, "--batch-size", 3)

    assert made.exit_code == 0, made.output
    loaded = checkpoint.load(str(tiny), "cpu", "float32")
    direction = Artifact.load(out / "dtr.json").numbers["direction"]
    assert direction.shape == (loaded.layers, loaded.model.config.get_text_config().hidden_size)
    with torch.no_grad():
        alone = [loaded.model(**loaded.inputs([[]], [asked]), output_hidden_states=True) for asked, _ in rows]
        states = [output.hidden_states[1][0, -1] for output in alone]
    torch.testing.assert_close(direction[1], (states[1] + states[3]) / 2 - (states[0] + states[2]) / 2)
    assert run("dtr", "--artifacts", out).exit_code == 0
    assert "run `foveate calibrate dtr`" in run("dtr").stderr


@pytest.mark.parametrize(
    ("rows", "fragments"),
    [
        ([], ["dtr: compares prompts of yours; give --data", "'harmful' or 'harmless'"]),
        (["is it?,harmful"], ["dtr: no sample has the label", "'harmless'"]),
        (["is it?,harmful", "is it?,no"], ["is 'no'; must be 'harmful' or 'harmless'"]),
    ],
)
def test_prompts_that_cannot_be_compared_are_refused_before_the_model_is_loaded(
    call: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[str], fragments: list[str]
) -> None:
    monkeypatch.setattr(checkpoint, "load", lambda *_: pytest.fail("the model is loaded"))
    path = tmp_path / "prompts.csv"
    path.write_text("\n".join(["question,answers", *rows]))
    given = ["--data", path] if rows else []

    assert_one_line(call("calibrate", "dtr", "--model", tiny, *given, "--out", tmp_path / "out"), *fragments)


def test_other_numbers_want_pictures(call: Any, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "prompts.csv"
    path.write_text("question,answers\nis it?,yes")

    refused = call("calibrate", "shortv", "--model", tiny, "--data", path, "--out", tmp_path / "out")
    assert_one_line(refused, "column 'image'")
