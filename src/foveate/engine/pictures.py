"""Pictures before the processor gets them: what a recipe does there, and that it was done."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from foveate.core.errors import FoveateError
from foveate.core.method import Method
from foveate.engine.program import Program

Picture = Any
"""A ``PIL.Image.Image``; its package is no dependency of the base, but who has pictures has it."""
_NEAREST, _BICUBIC = 0, 3
"""Numbers of filters, as PIL counts them."""


class Prepares:
    """The part of a session that changes pictures."""

    _program: Program

    def pictures(self, pictures: Sequence[Picture], processor: Any) -> list[Picture]:
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
        return [self._prepared(picture, processor, counts, program.reshaped) for picture in pictures]

    def _prepared(
        self, picture: Picture, processor: Any, counts: dict[tuple[int, int], int], reshaped: set[Method]
    ) -> Picture:
        program = self._program
        tokens = partial(_tokens, processor, program.anatomy.image_tokens, counts, picture)
        for method in program.pictures:
            size = (picture.height, picture.width)
            rows, columns = method.resize(size, tokens)
            if (rows, columns) != size:
                reshaped.add(method)
                # Indices of a palette have nothing in between.
                whole = picture.convert("RGB") if picture.mode in ("1", "P") else picture
                picture = whole.resize((columns, rows), _BICUBIC)
        return picture


def refuse_unprepared(program: Program) -> None:
    """Refuse pictures if the recipe acts before the processor and none ever came by there."""
    if program.pictures and program.reshaped is None:
        method = program.pictures[0]
        raise FoveateError(
            f"{method.name}: acts on pictures before the processor, and none came that way; give the processor "
            "session.pictures(images, processor)"
        )


def _tokens(
    processor: Any,
    placeholders: Sequence[int],
    counts: dict[tuple[int, int], int],
    picture: Picture,
    size: tuple[int, int],
) -> int:
    """Visual tokens of a picture of a size, as the processor says of any; ``counts`` are known already."""
    if size not in counts:
        any_of_size = picture.convert("RGB").resize((size[1], size[0]), _NEAREST)
        asked = [{"role": "user", "content": [{"type": "image", "image": any_of_size}]}]
        inputs = processor.apply_chat_template([asked], tokenize=True, return_dict=True, return_tensors="pt")
        counts[size] = sum(int((inputs["input_ids"] == each).sum()) for each in placeholders)
    return counts[size]
