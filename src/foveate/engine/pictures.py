"""Pictures before the processor gets them: what a recipe does there, and that it was done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from PIL import Image

from foveate.core.errors import FoveateError
from foveate.engine.program import Program


class Prepares:
    """The part of a session that changes pictures."""

    _program: Program

    def pictures(self, pictures: Sequence[Image.Image], processor: Any) -> list[Image.Image]:
        """The pictures as the recipe wants them, to be given to the processor instead; others as they are.

        >>> small = session.pictures(images, processor)  # doctest: +SKIP
        >>> inputs = processor(images=small, text=prompts, return_tensors="pt")  # doctest: +SKIP

        Args:
            pictures: of any number of prompts.
            processor: the model's, with a chat template: it is asked what the model makes of pictures of other sizes.

        Raises:
            FoveateError: if a picture cannot be what the recipe wants.
        """
        program = self._program
        if not program.pictures:
            return list(pictures)
        program.reshaped = program.reshaped or set()
        counts: dict[tuple[int, int], int] = {}
        return [
            self._prepared(picture, partial(_tokens, processor, program.anatomy.image_tokens, counts))
            for picture in pictures
        ]

    def _prepared(self, picture: Image.Image, tokens: Any) -> Image.Image:
        program = self._program
        assert program.reshaped is not None
        for method in program.pictures:
            size = (picture.height, picture.width)
            rows, columns = method.resize(size, tokens)
            if (rows, columns) != size:
                program.reshaped.add(method)
                # Indices of a palette have nothing in between.
                whole = picture.convert("RGB") if picture.mode in ("1", "P") else picture
                picture = whole.resize((columns, rows), Image.Resampling.BICUBIC)
        return picture


def refuse_unprepared(program: Program) -> None:
    """Refuse pictures if the recipe acts before the processor and none ever came by there."""
    if program.pictures and program.reshaped is None:
        method = program.pictures[0]
        raise FoveateError(
            f"{method.name}: acts on pictures before the processor, and none came that way; give the processor "
            "session.pictures(images, processor)"
        )


def _tokens(processor: Any, placeholders: Sequence[int], counts: dict[tuple[int, int], int], size: tuple[int, int]) -> int:
    """Visual tokens of a picture of a size: the processor is asked about an empty one; ``counts`` are known already."""
    if size not in counts:
        empty = Image.new("RGB", (size[1], size[0]))
        asked = [{"role": "user", "content": [{"type": "image", "image": empty}]}]
        inputs = processor.apply_chat_template([asked], tokenize=True, return_dict=True, return_tensors="pt")
        counts[size] = sum(int((inputs["input_ids"] == each).sum()) for each in placeholders)
    return counts[size]
