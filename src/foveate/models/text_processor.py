"""The tokenizer of a text model, asked as a processor is: by conversations whose turns are made of parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import BatchFeature

from foveate.core.errors import FoveateError

Turn = Mapping[str, Any]


class TextProcessor:
    """Has of a processor what `foveate.checkpoint` asks of one; a picture or a video is refused.

    Attributes:
        tokenizer: the model's.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    @property
    def chat_template(self) -> Any:
        """The tokenizer's."""
        return self.tokenizer.chat_template

    def apply_chat_template(
        self,
        conversation: Sequence[Turn] | Sequence[Sequence[Turn]],
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        processor_kwargs: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """What the tokenizer makes of one conversation, or of several; parts of a turn stand behind each other.

        Args:
            conversation: turns, each a role and text, or a list of parts ``{"type": "text", "text": ...}``.
            tokenize: whether ids are wanted, not text.
            return_dict: whether ids come with their mask, as what ``generate`` takes.
            processor_kwargs: options of the tokenizer (``padding``).
            options: of its ``apply_chat_template``.

        Raises:
            FoveateError: if a part is no text.
        """
        single = bool(conversation) and isinstance(conversation[0], Mapping)
        several: Any = [conversation] if single else conversation
        plain = [[{**turn, "content": _text(turn["content"])} for turn in turns] for turns in several]
        asked = plain[0] if single else plain
        if not tokenize:
            return self.tokenizer.apply_chat_template(asked, tokenize=False, **options)
        made = self.tokenizer.apply_chat_template(
            asked, tokenize=True, return_dict=True, tokenizer_kwargs=None, **options, **(processor_kwargs or {})
        )
        given = {name: made[name] for name in ("input_ids", "attention_mask")}
        return BatchFeature(given) if return_dict else given["input_ids"]

    def decode(self, ids: Any, **options: Any) -> str:
        """The tokenizer's."""
        return self.tokenizer.decode(ids, **options)  # type: ignore[no-any-return]

    def batch_decode(self, ids: Any, **options: Any) -> list[str]:
        """The tokenizer's."""
        return self.tokenizer.batch_decode(ids, **options)  # type: ignore[no-any-return]

    def save_pretrained(self, folder: str | Path) -> None:
        """The tokenizer's files."""
        self.tokenizer.save_pretrained(folder)


def _text(content: str | Sequence[Mapping[str, Any]]) -> str:
    if isinstance(content, str):
        return content
    other = next((part["type"] for part in content if part["type"] != "text"), None)
    if other is not None:
        raise FoveateError(f"{other}: the model reads text alone; leave it out, or use a vision-language model")
    return "".join(part["text"] for part in content)
