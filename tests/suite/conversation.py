"""Runs generate under a recipe and keeps what the suite compares."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from foveate.models import anatomy

STEPS = 16


def generate(model: Any, inputs: dict[str, Tensor], steps: int = STEPS, **options: Any) -> Any:
    """Greedy generation with logits and cache."""
    # Placeholders must not be generated: a real tokenizer gives them no chance either.
    settings: dict[str, Any] = dict(
        do_sample=False, output_logits=True, return_dict_in_generate=True, suppress_tokens=[7, 8, 9, 10]
    )
    return model.generate(**inputs, max_new_tokens=steps, **(settings | options))


def logits(output: Any) -> Tensor:
    """``[B, steps, V]``."""
    return torch.stack(output.logits, dim=1)


@contextmanager
def fed_lengths(model: Any) -> Iterator[list[int]]:
    """Collects how many tokens each forward of the language model was fed."""
    lengths: list[int] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = kwargs.get("inputs_embeds")
        lengths.append((kwargs["input_ids"] if given is None else given).shape[1])

    handle = anatomy(model).language_model.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield lengths
    finally:
        handle.remove()
