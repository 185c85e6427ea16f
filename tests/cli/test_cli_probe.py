"""``foveate probe`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from foveate.bench.probes import Hints, embedlens_run, horizon_run
from foveate.tasks import questions


@pytest.fixture
def probe(call: Any, tiny: Path, tmp_path: Path) -> Any:
    """Runs a probe on the tiny model into ``tmp_path / "out"``."""
    fixed = ["--model", tiny, "--tasks", "shape,attribute", "--n", 2, "--batch-size", 9, "--out", tmp_path / "out"]
    return lambda name, *options: call("probe", name, *fixed, *options)


def published(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "probes.json").read_text())


def check_picture(path: Path) -> None:
    with Image.open(path) as picture:
        picture.verify()


def test_the_horizon_is_drawn_and_handed_on(probe: Any, tmp_path: Path) -> None:
    result = probe("information-horizon", "--windows", 1, "--window", 6)

    assert result.exit_code == 0, result.output
    score, largest, whole = published(tmp_path)["figures"]
    assert [series["name"] for series in score["series"]] == ["mean over tasks", "shape", "attribute"]
    assert all(series["x"] == [0, 1, 2, 3] and len(series["low"]) == 4 for series in score["series"])
    assert [len(series["y"]) for series in largest["series"]] == [3] * 4
    assert [len(series["y"]) for series in whole["series"]] == [3] * 3
    assert set(Hints.load(tmp_path / "out").horizon_by_task) == {"shape", "attribute"}
    assert "Score when all visual tokens leave before a layer" in result.stdout
    check_picture(tmp_path / "out" / "information-horizon.png")


def test_windows_can_be_left_out(probe: Any, tmp_path: Path) -> None:
    result = probe("information-horizon", "--windows", 0)

    assert result.exit_code == 0, result.output
    assert len(published(tmp_path)["figures"]) == 1
    assert Hints.load(tmp_path / "out").information_horizon is None


def test_the_lens_is_drawn_and_handed_on(probe: Any, tmp_path: Path) -> None:
    probe("information-horizon", "--windows", 0)
    result = probe("embedlens")

    assert result.exit_code == 0, result.output
    assert [figure["probe"] for figure in published(tmp_path)["figures"]] == ["information-horizon"] + 3 * ["embedlens"]
    hints = Hints.load(tmp_path / "out")
    assert hints.sink_share is not None
    assert hints.dead_share is not None
    assert set(hints.horizon_by_task) == {"shape", "attribute"}
    check_picture(tmp_path / "out" / "embedlens.png")


@pytest.mark.parametrize(("name", "module"), [("information-horizon", horizon_run), ("embedlens", embedlens_run)])
def test_an_interrupted_probe_goes_on(
    probe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: Any
) -> None:
    calls, work = [], module.scores

    def interrupted(*arguments: Any) -> Any:
        if len(calls) == 1:
            raise KeyboardInterrupt
        calls.append(arguments)
        return work(*arguments)

    monkeypatch.setattr(module, "scores", interrupted)
    first = probe(name, "--tasks", "shape")
    monkeypatch.setattr(module, "scores", work)
    whole = tmp_path / "out" / "probes" / f"{name}.json"
    before = json.loads(whole.read_text())["values"]
    second = probe(name, "--tasks", "shape")
    after = json.loads(whole.read_text())["values"]

    assert first.exit_code == 130
    assert "the same command goes on" in first.stderr
    assert second.exit_code == 0, second.output
    assert before.items() <= after.items()
    assert len(after) > len(before)


def test_other_settings_in_the_same_folder_are_refused(probe: Any) -> None:
    probe("information-horizon", "--windows", 0, "--tasks", "shape")

    result = probe("information-horizon", "--windows", 0, "--window", 3)

    assert result.exit_code == 2
    assert result.stderr.startswith("foveate: window=3: ")


def test_an_unknown_task_is_one_line(probe: Any) -> None:
    result = probe("embedlens", "--tasks", "shapes")

    assert (result.exit_code, result.stdout) == (2, "")
    assert "did you mean 'shape'?" in result.stderr


def test_probes_of_own_data(call: Any, tiny: Path, tmp_path: Path) -> None:
    rows = []
    for number, each in enumerate(questions("shape", 8, seed=3)):
        each.image.save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": each.prompt, "answers": each.answer})
    data = tmp_path / "mine.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    fixed = ("--model", tiny, "--data", data, "--n", 3, "--batch-size", 3, "--out", tmp_path / "out")
    horizon, lens = call("probe", "information-horizon", "--windows", 0, *fixed), call("probe", "embedlens", *fixed)

    assert (horizon.exit_code, lens.exit_code) == (0, 0), horizon.output + lens.output
    assert set(Hints.load(tmp_path / "out").horizon_by_task) == {"mine"}
    assert "metric='box'" in call("probe", "embedlens", "--model", tiny, "--metric", "box").stderr
