"""`foveate claims` and `foveate reproduce`, on a claim about the embedded model."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]

CLAIM = """
source: this test
claims:
- {model: reference, recipe: uniform(keep=0.25), benchmarks: [shape], tokens: 36, of: 144, kept: 90.0, hardware: none}
"""


def test_claims_are_listed_and_shown(call: Call) -> None:
    everything, one = call("claims"), call("claims", "hiprune")

    assert everything.exit_code == one.exit_code == 0
    assert "hiprune" in everything.output
    assert "Table 2" in one.output


def test_a_claim_is_reproduced_and_resumed(call: Call, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(CLAIM)
    command = ["reproduce", str(tmp_path / "mine.yaml"), "--limit", "4", "--device", "cpu", "--out", str(tmp_path / "out")]

    first = call(*command)
    again = call(*command, "--resume")

    assert first.exit_code == again.exit_code == 0, first.output
    assert "36 of 144" in first.output
    assert "36.0 of 144.0" in again.output
    written = json.loads((tmp_path / "out" / "reproduction.json").read_text())
    assert written["claim"]["recipe"] == "uniform(keep=0.25)"
    assert written["n"] == 4


@pytest.mark.skipif(find_spec("lmms_eval") is not None, reason="it is installed here")
def test_without_lmms_eval_a_line_says_how_to_get_it(call: Call, tmp_path: Path) -> None:
    done = call("reproduce", "hiprune", "--device", "cpu", "--out", str(tmp_path))

    assert done.exit_code != 0
    assert "lmms-eval: is not installed; pip install 'foveate[lmms]'" in done.output
