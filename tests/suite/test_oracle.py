"""The physical limit and calibration."""

from __future__ import annotations

import pytest
import torch

import saccade
from saccade.core.artifact import Artifact
from saccade.core.errors import SaccadeError
from saccade.engine import oracle
from saccade.engine.calibrate import calibrate
from saccade.models import anatomy
from tests.suite.bodies import BODIES, ONE, RAGGED


@pytest.mark.parametrize("name", [name for name in BODIES if name != "qwen3_5"])
def test_the_limit_runs_as_many_rows_as_the_recipe_left(name: str) -> None:
    model, inputs = BODIES[name].model(), BODIES[name].inputs(RAGGED)
    with torch.no_grad(), saccade.attach(model, "fastv(layer=1, keep=4)") as session:
        model(**inputs)
    out = oracle.prefill(anatomy(model), session.report)()
    assert out.shape[:2] == (3, round(session.report.rows[-1] + 0.49))
    assert oracle.prefill_seconds(model, session.report, repeats=1) > 0


def test_the_limit_of_frozen_rows_computes_their_keys_and_values_only() -> None:
    model, inputs = BODIES["llava-clip"].model(), BODIES["llava-clip"].inputs(ONE)
    with torch.no_grad(), saccade.attach(model, "shortv(layers=(1,))") as session:
        model(**inputs)
    assert session.report.active[1] == session.report.rows[1] - 16
    assert oracle.prefill(anatomy(model), session.report)().shape[1] == session.report.rows[-1]


def test_calibrating_shortv_finds_that_the_last_layer_contributes_nothing(tmp_path) -> None:
    model, inputs = BODIES["llava-clip"].model(), BODIES["llava-clip"].inputs(RAGGED)
    artifact = calibrate("shortv", model, [inputs])
    assert artifact.numbers["order"][0] == 3
    assert artifact.numbers["contribution"][3] == pytest.approx(0, abs=1e-9)
    assert min(artifact.numbers["contribution"][:3]) > 1e-6

    model.save_pretrained(tmp_path)
    artifact.save(tmp_path / "saccade" / "shortv.json")
    again = type(model).from_pretrained(tmp_path)
    with saccade.attach(again, "shortv(frozen=2)") as session:
        again(**inputs)
    frozen = [layer for layer, (n, a) in enumerate(zip(session.report.rows, session.report.active)) if n != a]
    assert frozen == sorted(artifact.numbers["order"][:2])


def test_an_artifact_of_another_model_is_refused_by_name(tmp_path) -> None:
    model = BODIES["llava-clip"].model(layers=5)
    model.save_pretrained(tmp_path)
    fingerprint = anatomy(BODIES["llava-clip"].model()).traits().fingerprint
    Artifact("shortv", fingerprint, {"order": [3, 2, 1, 0]}).save(tmp_path / "saccade" / "shortv.json")
    with pytest.raises(SaccadeError, match="artifact of shortv: made on llava \\(4 layers"):
        saccade.attach(type(model).from_pretrained(tmp_path), "shortv")


def test_a_method_without_numbers_has_nothing_to_calibrate() -> None:
    with pytest.raises(SaccadeError, match="uniform: has nothing to calibrate"):
        calibrate("uniform", BODIES["llava-clip"].model(), [])
