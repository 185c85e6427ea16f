"""How a chat template tells a model of pictures that come one by one: what stands before, around and behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.core.errors import FoveateError

_MARK = "\N{OBJECT REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class Words:
    """The parts of a conversation about pictures.

    Attributes:
        before: what stands in front of the first picture.
        picture: what one picture adds.
        behind: what stands behind the last one, the question marked.
    """

    before: str
    picture: str
    behind: str

    @classmethod
    def of(cls, processor: Any, system: str | None = None) -> Words:
        """As the chat template of ``processor`` has them.

        Raises:
            FoveateError: if the template numbers pictures, or puts them elsewhere than one behind the other.
        """
        one, two, three = (_rendered(processor, count, system) for count in (1, 2, 3))
        first, mark, behind = one.partition(_MARK)
        second, third = two.partition(_MARK)[0], three.partition(_MARK)[0]
        picture = second.removeprefix(first)
        if not (mark and picture and first.endswith(picture) and second == first + picture and third == second + picture):
            raise FoveateError(
                "stream: the model's chat template does not put pictures one behind the other in front of the question, so "
                "none can come later; use a checkpoint whose template does, such as Qwen/Qwen2.5-VL-3B-Instruct"
            )
        return cls(first.removesuffix(picture), picture, mark + behind)

    def asking(self, question: str) -> str:
        """What stands behind the pictures when ``question`` is asked."""
        return self.behind.replace(_MARK, question)


def _rendered(processor: Any, pictures: int, system: str | None) -> str:
    content = [*({"type": "image"} for _ in range(pictures)), {"type": "text", "text": _MARK}]
    turns: list[dict[str, Any]] = [{"role": "user", "content": content}]
    if system is not None:
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return processor.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)  # type: ignore[no-any-return]
