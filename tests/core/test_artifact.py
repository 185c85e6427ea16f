"""Calibrated numbers survive on disk, and only fit the model that they were made on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError

MODEL = Fingerprint(family="llava", layers=4, width=48, vocabulary=64)
ORDER = Artifact("shortv", MODEL, {"order": [3, 1, 0, 2], "contribution": [0.25, 1e-12, 0.5, 0.0]})
WEIGHTS = {"layers.0.up.weight": (0.5, -0.25, 1e-9, 3.0), "layers.1.up.weight": (), "norm.weight": (1.0,)}
FITTED = Artifact("alvts", replace(MODEL, weights=WEIGHTS), {"width": 4}, {"causal": True, "rank": None})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "foveate" / "shortv.json"
    ORDER.save(path)

    assert Artifact.load(path) == ORDER


def test_parameters_and_the_sketch_of_the_weights_are_kept(tmp_path: Path) -> None:
    FITTED.save(tmp_path / "alvts.json")
    found = Artifact.load(tmp_path / "alvts.json")

    assert found == FITTED
    assert found.fingerprint.weights == WEIGHTS


def test_saving_again_replaces_the_file_and_leaves_no_other(tmp_path: Path) -> None:
    path = tmp_path / "shortv.json"
    ORDER.save(path)
    changed = Artifact("shortv", MODEL, {"order": [0, 1, 2, 3]})
    changed.save(path)

    assert Artifact.load(path) == changed
    assert list(tmp_path.iterdir()) == [path]


def test_a_save_that_fails_leaves_the_old_file_whole(tmp_path: Path) -> None:
    path = tmp_path / "shortv.json"
    ORDER.save(path)
    with pytest.raises(TypeError):
        Artifact("shortv", MODEL, {"order": object()}).save(path)

    assert Artifact.load(path) == ORDER


def test_a_save_that_fails_leaves_nothing_else(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        Artifact("shortv", MODEL, {"order": object()}).save(tmp_path / "shortv.json")

    assert list(tmp_path.iterdir()) == []


def test_a_saved_file_can_be_read_by_whoever_can_read_its_neighbours(tmp_path: Path) -> None:
    neighbour, path = tmp_path / "config.json", tmp_path / "shortv.json"
    neighbour.write_text("{}")
    ORDER.save(path)

    assert path.stat().st_mode == neighbour.stat().st_mode


def test_the_model_that_it_was_made_on_is_accepted() -> None:
    ORDER.check(Fingerprint("llava", 4, 48, 64), {})


@pytest.mark.parametrize(
    "other", [Fingerprint("gemma3", 4, 48, 64), Fingerprint("llava", 5, 48, 64), Fingerprint("llava", 4, 48, 65)]
)
def test_another_model_is_refused_by_name(other: Fingerprint) -> None:
    with pytest.raises(FoveateError) as error:
        ORDER.check(other, {})

    assert str(error.value) == (
        f"artifact of shortv: made on llava (4 layers, width 48, vocabulary 64), this model is {other}; calibrate it again"
    )


def sketched(**changed: tuple[float, ...] | None) -> Fingerprint:
    weights = WEIGHTS | {name.replace("_", "."): entries for name, entries in changed.items()}
    return replace(MODEL, weights={name: entries for name, entries in weights.items() if entries is not None})


@pytest.mark.parametrize(
    ("other", "found"),
    [
        (sketched(), None),
        (sketched(norm_weight=(1.003,)), None),
        (sketched(norm_weight=(1.005,)), "norm.weight"),
        (sketched(norm_weight=(-1.0,)), "norm.weight"),
        (sketched(norm_weight=(1.0, 1.0)), "norm.weight"),
        (sketched(norm_weight=(float("nan"),)), "norm.weight"),
        (sketched(norm_weight=()), None),
        (sketched(norm_weight=None), None),
        (sketched(lora_A=(0.5,)), "lora.A"),
        (sketched(qweight=()), None),
        (replace(MODEL, weights={}), None),
    ],
    ids=[
        "same",
        "rounded",
        "other",
        "sign",
        "size",
        "nan",
        "unread",
        "in another form",
        "adapter",
        "quantized",
        "offloaded",
    ],
)
def test_weights_are_compared_where_both_can_be_read(other: Fingerprint, found: str | None) -> None:
    assert FITTED.fingerprint.unlike(other) == found


def test_other_weights_are_refused_by_name() -> None:
    FITTED.check(sketched(), FITTED.parameters)
    with pytest.raises(FoveateError, match=r"artifact of alvts: made on other weights.*norm\.weight.*calibrate it again"):
        FITTED.check(sketched(norm_weight=(2.0,)), FITTED.parameters)
    with pytest.raises(FoveateError, match=r"made on a model without lora\.A; merge adapters, or calibrate it again"):
        FITTED.check(sketched(lora_A=(2.0,)), FITTED.parameters)


def test_numbers_from_before_weights_were_kept_are_read_and_refused(tmp_path: Path) -> None:
    path = tmp_path / "shortv.json"
    ORDER.save(path)
    content = json.loads(path.read_text())
    del content["weights"], content["parameters"]
    path.write_text(json.dumps(content))

    assert Artifact.load(path) == ORDER
    with pytest.raises(FoveateError, match=r"does not say on which weights it was made.*calibrate it again"):
        Artifact.load(path).check(sketched(), {})


@pytest.mark.parametrize(
    ("parameters", "says"),
    [({"causal": False}, "causal=True; .* causal=False"), ({"rate": 0.5}, "rate='unknown'; .* rate=0.5")],
)
def test_other_parameters_are_refused_by_name(parameters: dict[str, object], says: str) -> None:
    with pytest.raises(FoveateError, match=f"artifact of alvts: made with {says}"):
        FITTED.check(sketched(), parameters)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"method": "shortv", "numbers": {}, "fingerprint": {}, "weights": []}',
        '{"method": "shortv", "fingerprint": {"family": "llava"}}',
    ],
)
def test_a_file_that_is_no_artifact_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "shortv.json"
    path.write_text(content)

    with pytest.raises(FoveateError, match=r"artifact '.*shortv\.json': cannot be read"):
        Artifact.load(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"artifact '.*lost\.json': cannot be read"):
        Artifact.load(tmp_path / "lost.json")
