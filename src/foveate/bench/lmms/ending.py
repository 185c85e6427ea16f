"""Where an answer ends: at the first of the texts that a task names as ``until``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import BoolTensor, Tensor
from transformers import StoppingCriteria


def endings(asked: Mapping[str, Any]) -> list[str]:
    """The texts at which an answer ends."""
    until = asked.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def cut(answer: str, ends: Sequence[str]) -> str:
    """The answer up to the first of the texts at which it ends."""
    return answer[: min((answer.find(end) for end in ends if end in answer), default=len(answer))]


class Ended(StoppingCriteria):
    """Stops each row of a batch as soon as its answer, which begins at token ``start``, has reached its end.

    The ``stop_strings`` of transformers do not work with tokenizers of whole words, such as the reference model's.
    """

    def __init__(self, tokenizer: Any, ends: Sequence[str], start: int) -> None:
        self._tokenizer = tokenizer
        self._ends = ends
        self._start = start
        # A token is a byte of text at least; one more, because a decoder may strip what the first begins with.
        self._enough = max(len(end.encode()) for end in ends) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> BoolTensor:
        """Bool ``[batch]``."""
        tails = self._tokenizer.batch_decode(input_ids[:, self._start :][:, -self._enough :])
        ended = torch.tensor([any(end in tail for end in self._ends) for tail in tails], device=input_ids.device)
        return cast(BoolTensor, ended)
