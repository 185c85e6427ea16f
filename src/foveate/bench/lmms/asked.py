"""What lmms-eval asks, in the words of transformers: messages, and how to generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from foveate.core.errors import FoveateError
from foveate.core.text import split_outside_brackets

_LONGEST = 1024
"""New tokens where a task sets no limit."""
_SAMPLING = ("temperature", "top_p", "top_k")
_SEARCH = ("num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size")


def model_arguments(text: str, known: Sequence[str]) -> dict[str, str]:
    """``name=value,name=value``, where brackets protect the commas of a recipe.

    lmms-eval's own reading would cut ``recipe=hiprune(alpha=0.2, keep=64)`` in two.
    """
    arguments = {}
    for part in filter(None, map(str.strip, split_outside_brackets(text, ","))):
        name, equals, value = part.partition("=")
        if name not in known or not equals:
            raise FoveateError(f"model_args={part!r}: must be some of {', '.join(f'{each}=...' for each in known)}")
        arguments[name] = _unquoted(value)
    return arguments


def conversation(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages of a task as a processor's chat template takes them."""
    return [{"role": each["role"], "content": [_part(part) for part in each["content"]]} for each in messages]


def generate_arguments(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` for a task's ``generation_kwargs``; what other models need of these is left out.

    A temperature of 0 means greedy, and so does ``do_sample: false`` at any temperature.
    """
    given = {name: value for name, value in asked.items() if value is not None}
    samples = given.get("do_sample", "temperature" in given) and given.get("temperature", 1.0) > 0
    # Tasks switch top_p and top_k off with a 0, which transformers refuses.
    passed = [*_SEARCH, *(name for name in _SAMPLING if samples and given.get(name))]
    return {
        "max_new_tokens": int(given.get("max_new_tokens", _LONGEST)),
        "do_sample": bool(samples),
        **{name: given[name] for name in passed if name in given},
    }


def _part(part: Mapping[str, Any]) -> dict[str, Any]:
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] != "image":
        raise FoveateError(f"tasks: a question comes with {part['type']}; only tasks of text and images can be run")
    picture = part["url"]
    return {"type": "image", "image": picture.convert("RGB") if isinstance(picture, Image.Image) else picture}


def _unquoted(value: str) -> str:
    value = value.strip()
    return value[1:-1] if len(value) > 1 and value[0] == value[-1] and value[0] in "\"'" else value
