"""Finished cells stay finished, and results that do not belong together never meet."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from filelock import FileLock

from foveate.bench.cells import plan
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.records import RATIOS, Answer, Failure, Measurement, Record
from foveate.core.errors import FoveateError
from foveate.core.files import write_json

KEYS = (
    "model, task, method, keep, n, seed, score, score_low, score_high, retention, evidence_recall, visual_tokens, "
    "prefill_seconds, decode_seconds, efficiency, kv_bytes, batch, first_token_seconds, total_seconds, peak_bytes, "
    "speedup, speedup_low, speedup_high, first_token_speedup, first_token_speedup_low, first_token_speedup_high, "
    "total_speedup, total_speedup_low, total_speedup_high, efficiency_low, efficiency_high"
)
MEASURED = Measurement(
    answers=[Answer("what shape is red?", "star", "star", 1.0, None)],
    visual_tokens=144.0,
    prefill_seconds=0.1,
    decode_seconds=None,
    first_token_seconds=0.2,
    total_seconds=0.3,
    peak_bytes=None,
    kv_bytes=1e6,
    batch=1,
    pairs={name: [2.0] for name in RATIOS},
    visual_by_layer=[144.0],
    kv_by_layer=[1e6],
    evidence_by_layer=[None],
)


def record(method: str = "none", score: float = 1.0, keep: float | None = None) -> Record:
    return Record("reference", "shape", method, keep, 20, 0, score, 0.8, 1.0, None, None, 144.0, 0.1, None, 0.9, 1e6)


def test_results_are_a_list_of_records_with_exactly_the_promised_keys(folder: ResultFolder) -> None:
    folder.begin()
    folder.keep(record(), MEASURED)

    (entry,) = json.loads((folder.path / "results.json").read_text())
    assert ", ".join(entry) == KEYS


def test_retention_is_the_share_of_the_unmodified_score_whichever_cell_came_first(folder: ResultFolder) -> None:
    folder.begin()
    folder.keep(record("random", 0.4, 0.5), MEASURED)
    folder.keep(record("none", 0.8), MEASURED)

    assert [each.retention for each in folder.records] == [0.5, 1.0]


def test_retention_is_unknown_where_the_unmodified_model_scores_nothing(folder: ResultFolder) -> None:
    folder.begin()
    folder.keep(record("none", 0.0), MEASURED)
    folder.keep(record("random", 0.4, 0.5), MEASURED)

    assert [each.retention for each in folder.records] == [None, None]


def test_records_and_failures_stand_in_the_order_of_the_plan_whichever_was_finished_first(folder: ResultFolder) -> None:
    cells = plan(["shape"], ["fastv"], [0.5])
    _, random, uniform, *_ = cells
    folder.begin(cells)
    folder.keep(record("hiprune", keep=0.5), MEASURED)  # of an earlier plan
    folder.keep(record("fastv", keep=0.5), MEASURED)
    folder.keep(record("none"), MEASURED)
    folder.report(Failure(uniform, "late", ""))
    folder.report(Failure(random, "early", ""))

    assert [each.method for each in folder.records] == ["hiprune", "none", "fastv"]
    assert [entry["error"] for entry in json.loads((folder.path / "failures.json").read_text())] == ["early", "late"]


def test_what_a_killed_run_left_half_written_is_in_nobody_s_way(folder: ResultFolder, settings: Settings) -> None:
    (folder.path / ".settings.json.1").write_text("{")

    fresh = ResultFolder(folder.path, settings)
    fresh.begin()

    assert sorted(os.listdir(fresh.path)) == [".lock", "cells", "examples", "settings.json"]


def test_a_folder_with_results_is_refused_unless_resumed(folder: ResultFolder, settings: Settings) -> None:
    folder.begin()

    with pytest.raises(FoveateError, match="--resume"):
        ResultFolder(folder.path, settings)


def test_a_folder_in_which_another_run_works_is_refused_until_that_ends(tmp_path: Path, settings: Settings) -> None:
    other = FileLock(tmp_path / ".lock")
    with other, pytest.raises(FoveateError, match="another run works in it"):
        ResultFolder(tmp_path, settings)

    ResultFolder(tmp_path, settings).begin()


def test_a_resumed_folder_knows_its_finished_cells(folder: ResultFolder, settings: Settings) -> None:
    folder.begin()
    folder.keep(record(), MEASURED)

    resumed = ResultFolder(folder.path, settings, resume=True)

    assert [resumed.finished(cell) for cell in plan(["shape"], [], [0.5])] == [True, *[False] * 4]


def test_what_a_record_was_made_from_is_read_back(folder: ResultFolder) -> None:
    folder.begin()
    folder.keep(record("hiprune(keep=3) + fastv(layer=1)"), MEASURED)

    assert folder.scores(folder.records[0]) == [1.0]
    assert folder.pairs(folder.records[0])["speedup"] == [2.0]


@pytest.mark.parametrize(
    ("name", "value"), [("model", "elsewhere"), ("n", 21), ("seed", 1), ("dtype", "bfloat16"), ("batch_size", 8)]
)
def test_results_under_other_settings_are_refused_by_name(
    folder: ResultFolder, settings: Settings, name: str, value: object
) -> None:
    folder.begin()

    with pytest.raises(FoveateError, match=f"^{name}="):
        ResultFolder(folder.path, replace(settings, **{name: value}), resume=True)


def test_a_folder_of_something_else_is_refused(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(FoveateError, match="no results of a bench"):
        ResultFolder(tmp_path, settings, resume=True)


@pytest.mark.parametrize("content", ['[{"score": 1}]', "[{", "[1]", "7"])
def test_damaged_results_are_refused(folder: ResultFolder, settings: Settings, content: str) -> None:
    folder.begin()
    (folder.path / "results.json").write_text(content)

    with pytest.raises(FoveateError, match=r"results\.json"):
        ResultFolder(folder.path, settings, resume=True)


def test_records_of_an_older_version_are_refused_by_name(folder: ResultFolder, settings: Settings) -> None:
    folder.begin()
    old = {name: value for name, value in asdict(record()).items() if not name.startswith("total_")}
    write_json(folder.path / "results.json", [old])

    with pytest.raises(FoveateError, match="other records than this version's; name another folder"):
        ResultFolder(folder.path, settings, resume=True)


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "out").touch()

    with pytest.raises(FoveateError, match="cannot be written"):
        ResultFolder(tmp_path / "out", settings)


def test_a_write_that_is_cut_short_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.json"
    write_json(path, ["old"])

    def cut_short(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", cut_short)
    with pytest.raises(OSError, match="no space"):
        write_json(path, ["new"])

    assert json.loads(path.read_text()) == ["old"]
    assert os.listdir(tmp_path) == ["results.json"]


def test_settings_name_versions_and_machine(folder: ResultFolder, settings: Settings) -> None:
    folder.begin()

    found = json.loads((folder.path / "settings.json").read_text())
    assert {**found, **asdict(settings)} == found
    assert {"torch", "transformers", "foveate"} <= set(found["versions"])
    assert found["machine"]["cores"]


def test_a_setting_that_an_earlier_version_did_not_have_is_as_it_was(folder: ResultFolder, settings: Settings) -> None:
    folder.begin()
    file = folder.path / "settings.json"
    known = json.loads(file.read_text())
    del known["films"]
    file.write_text(json.dumps(known))

    ResultFolder(folder.path, settings, resume=True)
    with pytest.raises(FoveateError, match=r"^films=True: .* holds results with films=None, which cannot be mixed"):
        ResultFolder(folder.path, replace(settings, films=True), resume=True)
