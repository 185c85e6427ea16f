"""What lmms-eval asks, in the words of transformers; needs no lmms-eval."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from foveate import reference
from foveate.bench.lmms.asked import conversation, generate_arguments, model_arguments
from foveate.bench.lmms.ending import Ended, cut, endings
from foveate.core.errors import FoveateError


def test_commas_of_a_recipe_do_not_end_the_argument() -> None:
    read = model_arguments(
        "pretrained=reference,recipe=hiprune(alpha=0.2, keep=64) + fastv,seed=3", ("pretrained", "recipe", "seed")
    )

    assert read == {"pretrained": "reference", "recipe": "hiprune(alpha=0.2, keep=64) + fastv", "seed": "3"}


def test_quotes_around_a_recipe_are_not_part_of_it() -> None:
    assert model_arguments('recipe="hiprune(keep=64)"', ("recipe",)) == {"recipe": "hiprune(keep=64)"}


@pytest.mark.parametrize("text", ["keep=64", "reference"])
def test_an_unknown_model_argument_is_refused(text: str) -> None:
    with pytest.raises(FoveateError, match=rf"model_args='{text}': must be some of recipe=\.\.\."):
        model_arguments(f"recipe=none,{text}", ("recipe",))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, {"max_new_tokens": 1024, "do_sample": False}),
        ({"max_new_tokens": 16, "temperature": 0, "top_p": 1.0}, {"max_new_tokens": 16, "do_sample": False}),
        ({"max_new_tokens": 8, "do_sample": False, "temperature": 0.2}, {"max_new_tokens": 8, "do_sample": False}),
        ({"max_new_tokens": 8, "do_sample": True, "temperature": 0}, {"max_new_tokens": 8, "do_sample": False}),
        (
            {"max_new_tokens": 8, "temperature": 0.7, "top_p": 0, "num_beams": 2, "image_aspect_ratio": "pad"},
            {"max_new_tokens": 8, "do_sample": True, "temperature": 0.7, "num_beams": 2},
        ),
    ],
)
def test_generation_arguments(asked: dict, expected: dict) -> None:
    assert generate_arguments(asked) == expected


def test_pictures_stand_where_the_task_put_them_in_colour() -> None:
    grey = Image.new("L", (4, 4))
    content = [{"type": "text", "text": "this"}, {"type": "image", "url": grey}, {"type": "text", "text": "or that?"}]

    (message,) = conversation([{"role": "user", "content": content}])

    assert [part["type"] for part in message["content"]] == ["text", "image", "text"]
    assert message["content"][1]["image"].mode == "RGB"


def test_a_video_is_refused() -> None:
    with pytest.raises(FoveateError, match="comes with video"):
        conversation([{"role": "user", "content": [{"type": "video", "url": "clip.mp4"}]}])


def test_an_answer_is_cut_at_the_first_of_its_ends() -> None:
    assert cut("red\nQ: and Q: then", endings({"until": ["Q:", "\n", ""]})) == "red"


def test_each_row_ends_by_itself() -> None:
    tokenizer = reference.load()[1].tokenizer
    rows = tokenizer(["red blue red", "blue red blue"], add_special_tokens=False, return_tensors="pt").input_ids

    # The first token belongs to the prompt.
    ended = [Ended(tokenizer, ["red"], start=1)(rows[:, :length], torch.empty(0)).tolist() for length in (1, 2, 3)]

    assert ended == [[False, False], [False, True], [True, True]]
