"""What probes leave in their folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from foveate.bench.probes import Chart, Hints, Series, publish
from foveate.bench.probes.kept import Kept
from foveate.core.errors import FoveateError


def chart(title: str) -> Chart:
    return Chart(title, "caption", "x", "y", (Series("a", (0, 1), (0.5, 0.25)),))


def test_each_probe_replaces_its_own_charts_only(tmp_path: Path) -> None:
    publish(tmp_path, "one", [chart("old"), chart("older")], {"horizon": 3})
    publish(tmp_path, "two", [chart("other")], {"dead_share": 0.25})
    publish(tmp_path, "one", [chart("new")], {"horizon": None, "horizon_by_task": {"shape": 2}})

    figures = json.loads((tmp_path / "probes.json").read_text())["figures"]
    assert [figure["title"] for figure in figures] == ["other", "new"]
    assert figures[0]["series"] == [{"name": "a", "x": [0, 1], "y": [0.5, 0.25]}]
    assert Hints.load(tmp_path) == Hints(horizon_by_task={"shape": 2}, dead_share=0.25)


def test_hints_survive_json() -> None:
    hints = Hints(horizon=3, horizon_by_task={"shape": None}, information_horizon=4, sink_share=0.1, dead_share=0.3)

    assert Hints.from_json(json.loads(json.dumps(hints.to_json()))) == hints


def test_a_folder_without_probes_has_no_hints(tmp_path: Path) -> None:
    assert Hints.load(tmp_path) == Hints()


def test_a_broken_file_is_named_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "probes.json").write_text("{")

    with pytest.raises(FoveateError, match=r"probes\.json cannot be read .*; remove it"):
        Hints.load(tmp_path)


def test_what_is_kept_is_not_measured_again(tmp_path: Path) -> None:
    calls: list[Any] = []

    def measure(value: int) -> int:
        calls.append(value)
        return value

    for _ in range(2):
        kept = Kept(tmp_path / "probes" / "a.json", {"n": 5})
        assert [kept.get("x", measure, 1), kept.get("y", measure, 2)] == [1, 2]
    assert calls == [1, 2]


def test_measurements_under_other_settings_are_refused(tmp_path: Path) -> None:
    Kept(tmp_path / "a.json", {"n": 5}).get("x", int)

    with pytest.raises(FoveateError, match=r"^n=6: .* was measured with n=5; "):
        Kept(tmp_path / "a.json", {"n": 6})
