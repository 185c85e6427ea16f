"""``reference-smol``: SmolLM2 behind a vision tower, put together and, in a few steps, taught: ``make test-smol``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from foveate import FoveateError, checkpoint
from foveate.checkpoint import reference_smol, smol
from foveate.tasks import questions
from foveate_reference.training.evaluate import answer
from foveate_reference.training.smol import Settings, Student

QUICK = Settings(scenes=40, fitting=60, looking=1, steps=2, images=1, text=64)

MEASURED = checkpoint.evaluation("reference-smol")
LEARNT = [task for task, found in MEASURED.items() if found["score"] > 0.7]


@pytest.fixture(scope="module", autouse=True)
def there() -> Path:
    try:
        return smol.path()
    except FoveateError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def shipped() -> Any:
    return checkpoint.load("reference-smol", "cpu", "float32")


@pytest.mark.parametrize("task", LEARNT)
def test_it_sees(shipped: Any, task: str) -> None:
    asked = questions(task, 50, seed=11)
    right = sum(each.score(said) for each, said in zip(asked, answer(shipped.model, shipped.processor, asked), strict=True))
    assert right / len(asked) >= MEASURED[task]["score"] - 0.15


def test_what_was_learnt_is_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in reference_smol.home().iterdir()) < 12e6


def test_what_a_run_saves_answers_as_it_did_in_training(
    there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tower's scale goes into the projector, adapters go into the weights: losses as before, but for bfloat16."""
    student = Student(QUICK)
    # A patch lies nearest to the words for what it shows, of 64 pairs of them, before any answer is learnt.
    assert student.fit() > 0.5
    student.adapt()
    metrics = list(student.learn(2, 0))
    student.save(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(smol, "path", lambda: there)
    again = Student(QUICK)
    again.model = AutoModelForImageTextToText.from_pretrained(reference_smol.path(tmp_path), dtype=torch.float32).eval()
    again.projector, again.decoder = again.model.model.multi_modal_projector, again.model.model.language_model

    packed = student.draw(np.random.default_rng(0), 1)
    with torch.no_grad():
        (losses, _), (loaded, _) = student.answer_losses(packed), again.answer_losses(packed)

    assert [each["step"] for each in metrics] == [1, 2]
    assert any(adapter.up.abs().max() > 0 for adapter in student.adapters.values())
    torch.testing.assert_close(loaded, losses, atol=0.05, rtol=0.02)
