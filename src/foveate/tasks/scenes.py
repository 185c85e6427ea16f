"""Seeded scenes: a few coloured shapes and sometimes a sign, on a plain or noisy ground, drawn with NumPy.

A scene knows exactly what is in it and which pixels show it, so that answers are right by construction and the evidence
for an answer is a pixel mask. Everything is a function of the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "heart", "ring")
"""Shape names."""

COLOURS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (190, 20, 20)),
    "orange": ((255, 165, 0), (255, 128, 0), (245, 140, 30)),
    "yellow": ((255, 255, 0), (240, 220, 40), (255, 235, 60)),
    "green": ((0, 128, 0), (0, 255, 0), (30, 160, 60), (80, 200, 80)),
    "cyan": ((0, 255, 255), (0, 200, 215), (64, 224, 208)),
    "blue": ((0, 0, 255), (30, 70, 225), (30, 30, 160)),
    "purple": ((128, 0, 128), (150, 50, 205), (110, 40, 160)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 150, 190)),
}
"""Each colour name with the values it stands for: web colours and variants; a scene mixes two and adds jitter."""

LETTERS = "bcdefhjklmnprstuvxyz"
"""Letters on signs. Without ``a`` and ``i``, which are words, and without letters that look like a shape or each other."""

SIZE = 96
"""Side of a scene in pixels."""

_SUPERSAMPLING = 8


@dataclass(frozen=True)
class Thing:
    """A coloured shape. ``x`` and ``y`` are its left and top pixel, ``size`` the side of its bounding box."""

    shape: str
    colour: str
    x: int
    y: int
    size: int

    @property
    def centre(self) -> tuple[float, float]:
        """Centre of the bounding box as (x, y) in pixels."""
        return self.x + self.size / 2, self.y + self.size / 2


@dataclass(frozen=True)
class Scene:
    """A picture and all that is in it.

    ``pixels``: uint8 ``[H, W, 3]``; ``masks``: bool ``[things, H, W]``; ``sign``: the word on the sign or ``""``;
    ``letter_masks``: bool ``[3, H, W]``, the ink of each letter; ``sign_mask``: bool ``[H, W]``, the whole sign.
    """

    pixels: np.ndarray
    things: tuple[Thing, ...]
    masks: np.ndarray
    sign: str
    letter_masks: np.ndarray
    sign_mask: np.ndarray

    @property
    def image(self) -> Image.Image:
        """The picture as a PIL image."""
        return Image.fromarray(self.pixels)


def draw_scene(rng: np.random.Generator, size: int = SIZE, most: int = 6, sign_rate: float = 0.4) -> Scene:
    """Draw a scene of ``size`` x ``size`` pixels with 1 to ``most`` things and, at ``sign_rate``, a sign."""
    ground, dark = draw_ground(rng, size)
    canvas = ground.copy()
    taken: list[tuple[int, int, int, int]] = []

    sign, letter_masks, sign_mask = "", np.zeros((3, size, size), bool), np.zeros((size, size), bool)
    if rng.random() < sign_rate:
        sign = "".join(LETTERS[i] for i in rng.integers(len(LETTERS), size=3))
        taken.append(_draw_sign(rng, canvas, sign, letter_masks, sign_mask, dark))

    things, masks = [], []
    for shape, colour, side in _cast(rng, size, most):
        spot = free_spot(rng, size, (side, side), taken)
        if spot is None:
            continue
        x, y = spot
        taken.append((x, y, side, side))
        coverage = stencil(shape, side, bool(rng.random() < 0.2))
        patch = canvas[y : y + side, x : x + side]
        patch += coverage[..., None] * (shade(rng, colour) - patch)
        mask = np.zeros((size, size), bool)
        mask[y : y + side, x : x + side] = coverage > 0.5
        things.append(Thing(shape, colour, x, y, side))
        masks.append(mask)

    if rng.random() < 0.4:
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(2, 16))
    pixels = np.clip(canvas, 0, 255).astype(np.uint8)
    stacked = np.stack(masks) if masks else np.zeros((0, size, size), bool)
    return Scene(pixels, tuple(things), stacked, sign, letter_masks, sign_mask)


def _cast(rng: np.random.Generator, size: int, most: int) -> list[tuple[str, str, int]]:
    """Choose shape, colour and size of each thing; half of the scenes repeat few shapes and colours."""
    count = int(rng.integers(1, most + 1))
    names = list(COLOURS)
    shapes = rng.permutation(len(SHAPES))
    colours = rng.permutation(len(names))
    if rng.random() < 0.5:
        shapes, colours = shapes[: rng.integers(1, 5)], colours[: rng.integers(1, 5)]
    largest = {1: 0.65, 2: 0.4}.get(count, 0.3) * size
    smallest = 12 if count <= 2 else 14
    cast = []
    for _ in range(count):
        # Log-uniform: large shapes occur but do not dominate.
        side = int(np.exp(rng.uniform(np.log(smallest), np.log(max(largest, smallest + 8)))))
        cast.append((SHAPES[rng.choice(shapes)], names[rng.choice(colours)], side))
    return sorted(cast, key=lambda thing: -thing[2])


def free_spot(
    rng: np.random.Generator, size: int, extent: tuple[int, int], taken: list[tuple[int, int, int, int]]
) -> tuple[int, int] | None:
    """A random place for a box of ``extent`` (width, height) that touches none of ``taken``, or None."""
    width, height = extent
    for _ in range(40):
        x, y = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        if all(x >= a + w + 1 or a >= x + width + 1 or y >= b + h + 1 or b >= y + height + 1 for a, b, w, h in taken):
            return x, y
    return None


def shade(rng: np.random.Generator, colour: str) -> np.ndarray:
    """A value of the colour: one of its named values, or a mix of two, with a little jitter."""
    values = np.asarray(COLOURS[colour], np.float32)
    first, second = rng.integers(len(values), size=2)
    if rng.random() < 0.4:
        return values[first]
    mix = values[first] + np.float32(rng.random()) * (values[second] - values[first])
    return np.clip(mix + rng.normal(0, 8, 3), 0, 255).astype(np.float32)


def draw_ground(rng: np.random.Generator, size: int) -> tuple[np.ndarray, bool]:
    """A float32 ground ``[size, size, 3]`` and whether it is dark: pure, plain or noisy, never saturated."""
    dark = bool(rng.random() < 0.45)
    if rng.random() < 0.25:
        return np.full((size, size, 3), 0 if dark else 255, np.float32), dark
    level = rng.uniform(5, 75) if dark else rng.uniform(175, 250)
    ground = np.full((size, size, 3), level, np.float32) + rng.normal(0, 5, 3).astype(np.float32)
    if rng.random() < 0.6:
        # Coarse blotches under fine grain: neither is separable from a shape by frequency alone.
        blotches = rng.normal(0, rng.uniform(2, 10), (size // 8 + 1, size // 8 + 1, 1)).astype(np.float32)
        ground += np.kron(blotches, np.ones((8, 8, 1), np.float32))[:size, :size]
        ground += rng.standard_normal((size, size, 3), dtype=np.float32) * np.float32(rng.uniform(2, 18))
    return ground, dark


def _draw_sign(
    rng: np.random.Generator,
    canvas: np.ndarray,
    word: str,
    letter_masks: np.ndarray,
    sign_mask: np.ndarray,
    dark: bool,
) -> tuple[int, int, int, int]:
    """Draw the sign in place, fill its masks, and return its box (x, y, width, height)."""
    size = canvas.shape[0]
    letter_size = int(rng.integers(13, 18))
    gap, margin = int(rng.integers(1, 4)), int(rng.integers(2, 5))
    while True:
        glyphs = [glyph(letter.upper(), letter_size) for letter in word]
        width = sum(drawn.shape[1] for drawn in glyphs) + 2 * gap + 2 * margin
        if width <= size:
            break
        letter_size, gap, margin = letter_size - 1, 1, 2
    height = max(drawn.shape[0] for drawn in glyphs) + 2 * margin
    x, y = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
    plate_is_dark = dark
    if rng.random() < 0.7:
        plate_is_dark = bool(rng.random() < 0.5)
        canvas[y : y + height, x : x + width] = rng.uniform(0, 50) if plate_is_dark else rng.uniform(205, 255)
    ink = np.float32(rng.uniform(215, 255) if plate_is_dark else rng.uniform(0, 40))
    sign_mask[y : y + height, x : x + width] = True
    left = x + margin
    for mask, drawn in zip(letter_masks, glyphs, strict=True):
        rows, columns = drawn.shape
        patch = canvas[y + margin : y + margin + rows, left : left + columns]
        patch += drawn[..., None] * (ink - patch)
        mask[y + margin : y + margin + rows, left : left + columns] = drawn > 0.4
        left += columns + gap
    return x, y, width, height


@lru_cache(maxsize=4096)
def glyph(letter: str, height: int) -> np.ndarray:
    """Ink coverage of a capital letter, float32 ``[height, width]`` (shared by all callers: do not write)."""
    font = ImageFont.load_default(size=height * _SUPERSAMPLING)
    box = font.getbbox(letter, stroke_width=_SUPERSAMPLING // 3)
    tile = Image.new("L", (int(box[2] - box[0]), int(box[3] - box[1])))
    ImageDraw.Draw(tile).text((-box[0], -box[1]), letter, fill=255, font=font, stroke_width=_SUPERSAMPLING // 3)
    # The font's size is its line height; scaling the tight box back keeps the proportions of the letters.
    extent = max(1, round(tile.width / _SUPERSAMPLING)), max(1, round(tile.height / _SUPERSAMPLING))
    return np.asarray(tile.resize(extent, Image.Resampling.BOX), np.float32) / 255


@lru_cache(maxsize=4096)
def stencil(shape: str, side: int, hard: bool) -> np.ndarray:
    """Coverage of a shape in its box, float32 ``[side, side]`` in 0..1; ``hard`` leaves the edge without antialiasing."""
    scale = _SUPERSAMPLING
    tile = Image.new("L", (side * scale, side * scale))
    _outline(ImageDraw.Draw(tile), shape, side * scale - 1)
    coverage = np.asarray(tile.resize((side, side), Image.Resampling.BOX), np.float32) / 255
    return (coverage > 0.5).astype(np.float32) if hard else coverage


def _outline(pen: ImageDraw.ImageDraw, shape: str, edge: int) -> None:
    """Fill ``shape`` in the square from 0 to ``edge``."""

    def polygon(*points: tuple[float, float]) -> None:
        pen.polygon([(x * edge, y * edge) for x, y in points], fill=255)

    if shape == "circle":
        pen.ellipse((0, 0, edge, edge), fill=255)
    elif shape == "ring":
        pen.ellipse((0, 0, edge, edge), fill=255)
        hole = 0.27 * edge
        pen.ellipse((hole, hole, edge - hole, edge - hole), fill=0)
    elif shape == "square":
        pen.rectangle((0, 0, edge, edge), fill=255)
    elif shape == "triangle":
        polygon((0.5, 0), (1, 1), (0, 1))
    elif shape == "diamond":
        polygon((0.5, 0), (1, 0.5), (0.5, 1), (0, 0.5))
    elif shape == "cross":
        polygon(*((x, y) for x, y in _CROSS))
    elif shape == "star":
        polygon(*((x, y) for x, y in _STAR))
    elif shape == "heart":
        pen.ellipse((0, 0, 0.54 * edge, 0.54 * edge), fill=255)
        pen.ellipse((0.46 * edge, 0, edge, 0.54 * edge), fill=255)
        polygon((0.03, 0.38), (0.5, 0.3), (0.97, 0.38), (0.5, 1))
    else:
        raise ValueError(f"shape={shape!r}: must be one of {', '.join(SHAPES)}")


_CROSS = (
    (0.33, 0), (0.67, 0), (0.67, 0.33), (1, 0.33), (1, 0.67), (0.67, 0.67),
    (0.67, 1), (0.33, 1), (0.33, 0.67), (0, 0.67), (0, 0.33), (0.33, 0.33),
)  # fmt: skip


def _star_points() -> tuple[tuple[float, float], ...]:
    """Ten points of a five-pointed star, stretched to fill the unit square."""
    turns = np.pi * np.arange(10) / 5
    radius = np.where(np.arange(10) % 2 == 0, 1.0, 0.42)
    points = np.stack([np.sin(turns) * radius, -np.cos(turns) * radius], 1)
    low, high = points.min(0), points.max(0)
    return tuple((float(x), float(y)) for x, y in (points - low) / (high - low))


_STAR = _star_points()
