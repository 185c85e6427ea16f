"""A board to draw on: pictures made of shapes, letters and boxes, with a mark for each that knows its pixels."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from PIL import Image

from .question import Turn
from .scenes import COLOURS, LETTERS, SHAPES, draw_ground, free_spot, glyph, shade, stencil

T = TypeVar("T")

CELL = 8
"""Side in pixels of the cells in which places are answered, such as ``row3 col17``."""

SIDE = 192
"""Side of the pictures of these tasks in pixels."""

DIGITS = "0123456789"
CHARACTERS = LETTERS + DIGITS

Box = tuple[int, int, int, int]
"""Left, top, width and height in pixels."""


@dataclass(frozen=True, eq=False)
class Mark:
    """Something drawn: its left and top pixel, its ink (bool ``[h, w]``), and the names of what it shows, if it has them."""

    x: int
    y: int
    ink: np.ndarray
    shape: str = ""
    colour: str = ""
    letter: str = ""

    @property
    def name(self) -> str:
        """Colour and shape."""
        return f"{self.colour} {self.shape}"

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of its box as (x, y) in pixels."""
        height, width = self.ink.shape
        return self.x + width / 2, self.y + height / 2


class Board:
    """A square picture in the making; ``pixels`` float32 ``[side, side, 3]`` in 0..255."""

    def __init__(self, rng: np.random.Generator, side: int, pixels: np.ndarray | None = None) -> None:
        """On the ground of a scene, or on ``pixels``."""
        self.rng, self.side = rng, side
        self.pixels = draw_ground(rng, side)[0] if pixels is None else pixels
        self.marks: list[Mark] = []
        self.taken: list[Box] = []

    @property
    def image(self) -> Image.Image:
        """The picture as it is now."""
        return Image.fromarray(np.clip(self.pixels, 0, 255).astype(np.uint8))

    def spot(self, width: int, height: int) -> tuple[int, int] | None:
        """Left and top of a free place of this size, which is taken by it; None where there is none."""
        if (found := free_spot(self.rng, self.side, (width, height), self.taken)) is not None:
            self.taken.append((*found, width, height))
        return found

    def put(self, shape: str, colour: str, x: int, y: int, side: int, paint: np.ndarray | None = None) -> Mark:
        """Draw a shape, in a shade of its colour or in ``paint``."""
        shaded = shade(self.rng, colour) if paint is None else paint
        return self._stamp(stencil(shape, side, False), shaded, x, y, shape=shape, colour=colour)

    def scatter(self, names: Iterable[tuple[str, str]], smallest: int, largest: int) -> list[Mark]:
        """Draw shapes of (shape, colour) at free places; those that find none are left out."""
        marks = []
        for shape, colour in names:
            side = int(self.rng.integers(smallest, largest + 1))
            if (found := self.spot(side, side)) is not None:
                marks.append(self.put(shape, colour, *found, side))
        return marks

    def fill(self, box: Box, colour: float | np.ndarray, border: float | None = None) -> None:
        """Fill a box with a grey level or a colour, with a border of another grey level."""
        x, y, width, height = box
        if border is not None:
            self.pixels[y : y + height, x : x + width] = border
            x, y, width, height = x + 1, y + 1, width - 2, height - 2
        self.pixels[y : y + height, x : x + width] = colour

    def write(self, text: str, x: int, y: int, height: int, ink: float, gap: int = 2) -> Box:
        """Write characters (a space is half as wide as high); returns their box. ``x`` and ``y`` are its left and top."""
        left, bottom = x, y
        for character in text:
            if character == " ":
                left += height // 2
                continue
            drawn = glyph(character.upper(), height)
            self._stamp(drawn, np.float32(ink), left, y, letter=character)
            left, bottom = left + drawn.shape[1] + gap, max(bottom, y + drawn.shape[0])
        return x, y, left - gap - x, bottom - y

    def mask(self, *parts: Mark | Box) -> np.ndarray:
        """Pixels of marks and boxes: bool ``[side, side]``."""
        mask = np.zeros((self.side, self.side), bool)
        for part in parts:
            if isinstance(part, Mark):
                height, width = part.ink.shape
                mask[part.y : part.y + height, part.x : part.x + width] |= part.ink
            else:
                x, y, width, height = part
                mask[y : y + height, x : x + width] = True
        return mask

    def _stamp(self, coverage: np.ndarray, paint: np.ndarray | np.float32, x: int, y: int, **names: str) -> Mark:
        height, width = coverage.shape
        patch = self.pixels[y : y + height, x : x + width]
        patch += coverage[..., None] * (paint - patch)
        mark = Mark(x, y, coverage > 0.4, **names)
        self.marks.append(mark)
        return mark


@dataclass(frozen=True, eq=False)
class Drawn:
    """Finished boards and what can be asked about them; ``ask`` returns None where a draw leads to no question."""

    boards: tuple[Board, ...]
    ask: Callable[[np.random.Generator], Turn | None]

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures."""
        return tuple(board.image for board in self.boards)


def choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """One of several words."""
    return options[int(rng.integers(len(options)))]


def characters(rng: np.random.Generator, among: str, count: int) -> str:
    """A random word."""
    return "".join(among[i] for i in rng.integers(len(among), size=count))


def distinct(rng: np.random.Generator, among: Sequence[T], count: int) -> list[T]:
    """Different ones of several, in random order."""
    return [among[i] for i in rng.permutation(len(among))[:count]]


def spelled(word: str) -> str:
    """A word as answers give it: character by character."""
    return " ".join(word)


def pairs(rng: np.random.Generator, count: int) -> list[tuple[str, str]]:
    """Different (shape, colour) pairs."""
    numbers = rng.permutation(len(SHAPES) * len(COLOURS))[:count]
    names = tuple(COLOURS)
    return [(SHAPES[number // len(names)], names[number % len(names)]) for number in numbers]


def cell(x: float, y: float) -> str:
    """The cell that a pixel lies in."""
    return f"row{int(y) // CELL + 1} col{int(x) // CELL + 1}"
