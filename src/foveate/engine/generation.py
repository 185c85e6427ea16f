"""Ways in which ``generate`` runs a model: what has to be known of them, and which are refused."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.items import ItemTokens
from foveate.core.method import Cache, Pictures
from foveate.core.weights import Weights
from foveate.engine.call import Call
from foveate.engine.program import Program


def prefill(
    program: Program,
    current: Callable[[], Call | None],
    original: Callable[..., Any],
    input_ids: Tensor,
    generation_config: Any,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Read a prompt, in one forward or in parts."""
    in_parts = generation_config.prefill_chunk_size is not None
    inside = [
        m.name
        for m in program.methods
        if not isinstance(m, Pictures | Weights) and (not isinstance(m, ItemTokens) or isinstance(m, Cache) or m.asks)
    ]
    if inside and in_parts:
        raise FoveateError(
            f"prefill_chunk_size={generation_config.prefill_chunk_size}: {inside[0]} needs the prompt in one forward; use "
            "prefill_chunk_size=None"
        )
    call = current()
    if call is not None and in_parts:
        call.reading_in_parts()
    output = original(input_ids, generation_config, *args, **kwargs)
    if call is not None:
        call.prompt_was_read()
        call.logits_are_there()
    return output


def batching(program: Program, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Continuous batching has a cache of its own."""
    raise FoveateError(f"continuous batching: not possible under {program.recipe}; use generate() with a batch")


def candidates(
    program: Program, current: Callable[[], Call | None], original: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Tokens are tried out, and some are taken back."""
    owner = program.cache
    if owner is not None and owner.stepwise:
        raise FoveateError(
            f"assisted decoding: {owner.name} evicts with every token, and what is gone cannot be taken back; "
            "leave out prompt_lookup_num_tokens and assistant_model"
        )
    source = original(*args, **kwargs)
    source.get_candidates = functools.partial(_behind_prompt, current, source.get_candidates)
    return source


def _behind_prompt(
    current: Callable[[], Call | None], propose: Callable[..., Any], input_ids: Tensor, **options: Any
) -> Any:
    call = current()
    # Candidates beside the prompt would be read as a part of it.
    return (input_ids, None) if call is not None and not call.prompt_is_read else propose(input_ids, **options)


def refuse_assistant(program: Program, assistant: Any) -> None:
    """transformers drops the pictures in the assistant's first forward, so it would draft blindly, or fail."""
    if program.methods and assistant is not None:
        raise FoveateError(
            f"assistant_model: not possible under {program.recipe}, as transformers hands the assistant a prompt without "
            "its pictures; use prompt_lookup_num_tokens, which needs no second model"
        )
