"""A model answers blocks of rows as it answers each alone, and what is wrong with one is its own affair."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from foveate import tasks
from foveate.checkpoint import Checkpoint
from foveate.core.errors import FoveateError
from foveate.serving.asked import Asked, read
from foveate.serving.on_model import ModelAnswers, OnModel

COMMON = {"model": "reference", "seed": 0, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def answers() -> ModelAnswers:
    return OnModel(recipe="hiprune(keep=36)", **COMMON).load()


@pytest.fixture
def rows(tmp_path: Path) -> list[Asked]:
    """Six questions: the third about a picture that is not there, the fourth a conversation, the fifth of short answers."""
    found = list[dict[str, Any]]()
    for number, asked in enumerate(tasks.questions("attribute", 6, seed=0)):
        asked.image.save(tmp_path / f"{number}.png")
        found.append({"id": number, "image": f"{number}.png", "question": asked.prompt})
    found[2]["image"] = "nowhere.png"
    found[3] |= {"image": ["3.png", "0.png"], "question": [found[3]["question"]] * 2}
    found[4]["max_new_tokens"] = 1
    path = tmp_path / "in.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in found))
    return list(read(path, 8))


def test_each_row_of_a_block_is_answered_as_alone(answers: ModelAnswers, rows: list[Asked]) -> None:
    together = answers(rows)
    alone = [answers([row])[0] for row in rows]

    assert [each.id for each in together] == list(range(6))
    for one, other in zip(together, alone, strict=True):
        assert (one.answer, one.before, one.after, one.error) == (other.answer, other.before, other.after, other.error)
    right = [asked.answer for asked in tasks.questions("attribute", 6, seed=0)]
    assert [each.answer for each in together[:2]] == right[:2]
    assert together[2].error.endswith("nowhere.png': no such file")
    assert len(together[3].answer) == 2
    assert [(each.before, each.after) for each in together if each.error is None] == [(144, 36)] * 2 + [(288, 72)] + [
        (144, 36)
    ] * 2
    assert all(each.seconds > 0 for each in together if each.error is None)


def test_rows_that_fail_together_are_tried_alone(
    answers: ModelAnswers, rows: list[Asked], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs, sizes = Checkpoint.inputs, list[int]()

    def short_of_memory(self: Checkpoint, pictures: Sequence[Any], prompts: Sequence[str], session: Any) -> Any:
        sizes.append(len(prompts))
        if len(prompts) > 1 or len(sizes) == 4:
            raise RuntimeError("out of\nmemory")
        return inputs(self, pictures, prompts, session)

    monkeypatch.setattr(Checkpoint, "inputs", short_of_memory)
    first, second, last = answers([rows[0], rows[1], rows[5]])

    assert sizes == [3, 1, 1, 1]
    assert (first.error, second.error, last.error) == (None, None, "RuntimeError: out of memory")
    assert last.to_json() == {"id": 5, "error": "RuntimeError: out of memory"}


def test_the_place_of_a_picture_is_not_to_be_named(answers: ModelAnswers, tmp_path: Path, rows: list[Asked]) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text('{"id": 1, "image": "0.png", "question": "<image> what?"}\n')

    (found,) = answers(list(read(path, 8)))

    assert found.error.startswith("prompt='<image> what?': leave out '<image>'")


def test_a_recipe_that_the_model_refuses_is_refused_as_it_is_loaded() -> None:
    with pytest.raises(FoveateError):
        OnModel(recipe="fastv(layer=400, keep=0.5)", **COMMON).load()
