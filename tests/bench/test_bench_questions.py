"""How generated questions are put: reference models get them as they were trained, others are asked for a short answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from foveate import reference, tasks
from foveate.bench import questions
from foveate.bench.folder import Settings
from foveate.bench.questions import SHORT, SHORT_LIST, Wording, ask
from foveate.core.errors import FoveateError


def tokenizer(known: bool) -> Any:
    ids = [5, 6] if known else [5, 0]
    return type("Tokenizer", (), {"unk_token_id": 0, "__call__": lambda self, text: SimpleNamespace(input_ids=ids)})()


@pytest.mark.parametrize("name", reference.MODELS)
def test_reference_models_are_asked_as_they_were_trained(name: str) -> None:
    settings = Settings(name, 3, 0, "cpu", "float32", 3, short=Wording.of(name, None).short)

    asked = ask(settings, "dialogue")

    assert [each.prompt for each in asked] == [each.prompt for each in tasks.questions("dialogue", 3, 0)]


@pytest.mark.parametrize("known", [True, False])
def test_a_model_that_knows_the_words_is_asked_for_a_short_answer(monkeypatch: pytest.MonkeyPatch, known: bool) -> None:
    monkeypatch.setattr(questions, "load_processor", lambda name: SimpleNamespace(tokenizer=tokenizer(known)))

    assert Wording.of("owner/name", None).short == known


def test_every_turn_asks_for_what_its_metric_wants() -> None:
    short = Wording(None, short=True)
    dialogue, caption = (short(tasks.question(task, 0, 0)) for task in ("dialogue", "caption"))

    assert all(turn.prompt.endswith(f"?\n{SHORT}") for turn in dialogue.turns)
    assert caption.prompt.endswith(SHORT_LIST)


def test_another_metric_scores_the_same_answers() -> None:
    question = Wording("contains", short=False)(tasks.question("shape", 0, 0))

    assert question.score([f"the shape is a {question.answer}."]) == 1


@pytest.mark.parametrize("metric", ["box", "bleu"])
def test_metrics_that_do_not_fit_are_refused(metric: str) -> None:
    with pytest.raises(FoveateError, match=rf"^metric='{metric}': must be one of exact, contains"):
        Wording.of("reference", metric)
