"""A text model served on transformers, its cache under a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from tests.hub import write_text_checkpoint
from tests.serving.door.conftest import SMALL, chat
from tests.serving.door.fallback import Served

from foveate import checkpoint
from foveate.serving.door.answer import said
from foveate.serving.door.rules import TRANSFORMERS, Rules
from foveate.serving.settings import Settings

LONG = "what is it, and what is that over there? " * 8


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    model = write_text_checkpoint(tmp_path_factory.mktemp("text"))
    server = Served(Rules(Settings("snapkv(keep=0.3, window=8)"), behind=TRANSFORMERS), str(model))
    yield server
    server.close()


def test_text_is_answered_under_a_recipe_of_the_cache(served: Served) -> None:
    whole = served.ask(chat(text=LONG, max_tokens=6))
    pieces = served.ask(chat(text=LONG, max_tokens=6, stream=True))

    assert whole.status == 200, whole.body
    loaded = checkpoint.load(served.loaded.name, "cpu", "float32")
    with loaded.attach("snapkv(keep=0.3, window=8)") as session:
        expected = loaded.answer(loaded.inputs([[]], [LONG]), 6)[0]
    assert session.report.kv_kept[0] < 0.4
    assert (said(whole.body) or "").strip() == (said(pieces.body) or "").strip() == expected


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (chat(SMALL), "messages: 'image_url': this model reads text alone; leave it out"),
        (chat(foveate={"keep": 0.5}), "foveate.keep=0.5: snapkv(keep=0.3, window=8) has 0 methods that keep so many tokens"),
    ],
)
def test_what_a_text_model_does_not_take_is_one_line(served: Served, body: object, line: str) -> None:
    reply = served.ask(body)

    assert reply.status == 400
    assert json.loads(reply.body)["error"]["message"].startswith(line)
