"""Calibrated numbers survive on disk, and only fit the model that they were made on."""

from __future__ import annotations

from pathlib import Path

import pytest

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError

MODEL = Fingerprint(family="llava", layers=4, width=48, vocabulary=64)
ORDER = Artifact("shortv", MODEL, {"order": [3, 1, 0, 2], "contribution": [0.25, 1e-12, 0.5, 0.0]})


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "foveate" / "shortv.json"
    ORDER.save(path)

    assert Artifact.load(path) == ORDER


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
    ORDER.check(Fingerprint("llava", 4, 48, 64))


@pytest.mark.parametrize(
    "other", [Fingerprint("gemma3", 4, 48, 64), Fingerprint("llava", 5, 48, 64), Fingerprint("llava", 4, 48, 65)]
)
def test_another_model_is_refused_by_name(other: Fingerprint) -> None:
    with pytest.raises(FoveateError) as error:
        ORDER.check(other)

    assert str(error.value) == (
        f"artifact of shortv: made on llava (4 layers, width 48, vocabulary 64), this model is {other}; calibrate it again"
    )


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"method": "shortv", "fingerprint": {"family": "llava"}}'])
def test_a_file_that_is_no_artifact_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "shortv.json"
    path.write_text(content)

    with pytest.raises(FoveateError, match=r"artifact '.*shortv\.json': cannot be read"):
        Artifact.load(path)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(FoveateError, match=r"artifact '.*lost\.json': cannot be read"):
        Artifact.load(tmp_path / "lost.json")
