"""The physical limit and calibration."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import foveate
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.engine import limit
from foveate.engine.calibrate import calibrate
from foveate.models import anatomy
from tests.suite.bodies import BODIES, ONE, RAGGED


@pytest.mark.parametrize("name", [name for name in BODIES if name != "qwen3_5"])
def test_the_limit_runs_as_many_rows_as_the_recipe_left(name: str) -> None:
    model, inputs = BODIES[name].model(), BODIES[name].inputs(RAGGED)
    with torch.no_grad(), foveate.attach(model, "fastv(layer=1, keep=4)") as session:
        model(**inputs)
    out = limit.prefill(anatomy(model), session.report)()
    assert out.shape[:2] == (3, round(session.report.rows[-1] + 0.49))
    assert limit.prefill_seconds(model, session.report, repeats=1) > 0


def test_the_limit_of_frozen_rows_computes_their_keys_and_values_only() -> None:
    model, inputs = BODIES["llava-clip"].model(), BODIES["llava-clip"].inputs(ONE)
    with torch.no_grad(), foveate.attach(model, "shortv(layers=(1,))") as session:
        model(**inputs)
    assert session.report.active[1] == session.report.rows[1] - 16
    assert limit.prefill(anatomy(model), session.report)().shape[1] == session.report.rows[-1]


def test_the_limit_of_rows_that_skip_layers_leaves_them_out_until_they_come_back() -> None:
    model, inputs = BODIES["llava-clip"].model(), BODIES["llava-clip"].inputs(ONE)
    recipe = "hidrop(late_entry=2, layer_list=(2,), keep_list=(6,), early_exit=4)"
    with torch.no_grad(), foveate.attach(model, recipe) as session:
        model(**inputs)
    with calls_of_layers(model) as calls:
        limit.prefill(anatomy(model), session.report)()
    assert [rows for rows, _ in calls] == list(session.report.rows) == [11, 27, 17, 11]


@pytest.mark.parametrize("recipe", ["none", "snapkv(keep=0.5, window=4)", "mixkv(keep=0.5, window=4, host='adakv')"])
def test_the_limit_of_decoding_reads_as_many_entries_as_the_recipe_left(recipe: str) -> None:
    model, inputs = BODIES["llava-clip"].model(), BODIES["llava-clip"].inputs(ONE)
    prompt = inputs["input_ids"].shape[1]
    with torch.no_grad(), foveate.attach(model, recipe):
        entries = limit.held(model(**inputs, use_cache=True).past_key_values)
    assert entries == pytest.approx([prompt if recipe == "none" else prompt // 2] * 4, abs=1)
    run = limit.decode(anatomy(model), 1, entries, 2)
    with calls_of_layers(model) as calls:
        run()
    before = [math.ceil(count) for count in entries]
    assert calls == [(1, count) for count in [*before, *(count + 1 for count in before)]]


@contextmanager
def calls_of_layers(model: Any) -> Iterator[list[tuple[int, int]]]:
    """Collects how many rows each decoder layer was fed, and how many entries its cache held."""
    calls: list[tuple[int, int]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        layer = module.self_attn.layer_idx
        calls.append((args[0].shape[1], kwargs["past_key_values"].get_seq_length(layer)))

    hooks = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in anatomy(model).layers]
    try:
        yield calls
    finally:
        for handle in hooks:
            handle.remove()


def test_calibrating_shortv_finds_that_the_last_layer_contributes_nothing(tmp_path) -> None:
    model, inputs = BODIES["llava-clip"].model(), BODIES["llava-clip"].inputs(RAGGED)
    artifact = calibrate("shortv", model, [inputs])
    assert artifact.numbers["order"][0] == 3
    assert artifact.numbers["contribution"][3] == pytest.approx(0, abs=1e-9)
    assert min(artifact.numbers["contribution"][:3]) > 1e-6

    model.save_pretrained(tmp_path)
    artifact.save(tmp_path / "foveate" / "shortv.json")
    again = type(model).from_pretrained(tmp_path)
    with foveate.attach(again, "shortv(frozen=2)") as session:
        again(**inputs)
    frozen = [layer for layer, (n, a) in enumerate(zip(session.report.rows, session.report.active)) if n != a]
    assert frozen == sorted(artifact.numbers["order"][:2])


def test_an_artifact_of_another_model_is_refused_by_name(tmp_path) -> None:
    model = BODIES["llava-clip"].model(layers=5)
    model.save_pretrained(tmp_path)
    fingerprint = anatomy(BODIES["llava-clip"].model()).traits().fingerprint
    Artifact("shortv", fingerprint, {"order": [3, 2, 1, 0]}).save(tmp_path / "foveate" / "shortv.json")
    with pytest.raises(FoveateError, match="artifact of shortv: made on llava \\(4 layers"):
        foveate.attach(type(model).from_pretrained(tmp_path), "shortv")


def test_a_method_without_numbers_has_nothing_to_calibrate() -> None:
    with pytest.raises(FoveateError, match="uniform: has nothing to calibrate"):
        calibrate("uniform", BODIES["llava-clip"].model(), [])
