"""What a model looks at, drawn on the picture: kept and dropped cells, merged groups, heat maps, evidence.

Pure functions from a picture and arrays over its grid to a picture. Cells are numbered in raster order.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from PIL import Image

Grid = tuple[int, int]
"""Rows and columns."""

SIDE = 480
"""The longer side of what is drawn, in pixels."""
DARK, LIGHT = np.array([20, 22, 30]), np.array([214, 218, 228])
"""What dropped cells fade to: dark in a light picture, light in a dark one."""
LINE = np.array([255, 255, 255])
SEEN = np.array([0, 229, 255])
MISSED = np.array([255, 92, 72])
"""Evidence that is still there, and evidence that is not."""
HEAT = colormaps["viridis"]
_GOLDEN = (5**0.5 - 1) / 2


def overlay(image: Image.Image, grid: Grid, alive: np.ndarray, evidence: np.ndarray | None = None) -> Image.Image:
    """The cells ``alive`` (raster indices) clear, the others dimmed; ``evidence`` (bool ``[rows, columns]``) outlined."""
    kept = np.zeros(grid[0] * grid[1], dtype=bool)
    kept[alive] = True
    pixels, cells = _canvas(image, grid)
    pixels = np.where(kept[cells][..., None], pixels, _dimmed(pixels))
    pixels = _lined(pixels, kept[cells], LINE, 0.6)
    return _with_evidence(pixels, cells, kept, evidence)


def merged(image: Image.Image, grid: Grid, fate: np.ndarray, evidence: np.ndarray | None = None) -> Image.Image:
    """Cells that live on in one token in one colour, the token's own cell clear; what is gone is dimmed.

    ``fate`` ``[count]`` says for each cell in which it lives on, -1 = gone.
    """
    pixels, cells = _canvas(image, grid)
    own = fate == np.arange(len(fate))
    sizes = np.bincount(fate[fate >= 0], minlength=len(fate))
    joined = (fate >= 0) & (sizes[np.maximum(fate, 0)] > 1)
    hues = np.array([_hue(number * _GOLDEN % 1) for number in range(len(fate))])
    rank = np.cumsum(sizes > 1) - 1  # groups that follow each other are far apart in colour
    tint = hues[rank[np.maximum(fate, 0)]]
    strength = np.where(joined, np.where(own, 0.1, 0.5), 0.0)[cells][..., None]
    coloured = pixels * (1 - strength) + tint[cells] * strength
    pixels = np.where((fate >= 0)[cells][..., None], coloured, _dimmed(pixels))
    pixels = _lined(pixels, fate[cells], DARK, 0.45)
    pixels = _lined(pixels, (own & joined)[cells], LINE, 0.9)
    return _with_evidence(pixels, cells, own, evidence)


def heat(
    image: Image.Image,
    grid: Grid,
    values: np.ndarray,
    evidence: np.ndarray | None = None,
    kept: np.ndarray | None = None,
) -> Image.Image:
    """``values`` ``[count]`` in [0, 1] as colours over a grey picture, nan dimmed; ``kept`` (raster indices) outlined.

    Evidence counts as there where it is kept, or, if nothing is said about that, where its value is not 0.
    """
    pixels, cells = _canvas(image, grid)
    known = np.isfinite(values)
    filled = np.where(known, values, 0.0)
    grey = pixels.mean(axis=2, keepdims=True) / 255
    # The picture shows through as light and shade, so that colours stay what the scale says.
    shaded = (HEAT(filled)[:, :3] * 255)[cells] * (0.65 + 0.35 * grey)
    pixels = np.where(known[cells][..., None], shaded, _dimmed(pixels))
    there = filled > 0
    if kept is not None:
        there = np.zeros(len(values), dtype=bool)
        there[kept] = True
        pixels = _lined(pixels, there[cells], LINE, 0.75)
    return _with_evidence(pixels, cells, there, evidence)


def bounds(values: Sequence[np.ndarray]) -> tuple[float, float]:
    """The range of the scores of several grids; a few outliers do not count."""
    known = np.concatenate([grid[np.isfinite(grid)] for grid in values])
    low, high = np.quantile(known, [0.03, 0.97]) if len(known) else (0.0, 1.0)
    return float(low), float(high if high > low else known.max(initial=low))


def scaled(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Scores between ``low`` and ``high`` in [0, 1], by their root: attention is a few peaks above a plain."""
    return np.clip((values - low) / max(high - low, np.finfo(float).tiny), 0, 1) ** 0.5


def beside(pictures: Sequence[Image.Image], gap: int = 8) -> Image.Image:
    """Pictures next to each other, as high as the highest, on nothing."""
    if len(pictures) == 1:
        return pictures[0]
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    whole = Image.new("RGBA", (width, max(picture.height for picture in pictures)), (0, 0, 0, 0))
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width + gap
    return whole


def _canvas(image: Image.Image, grid: Grid) -> tuple[np.ndarray, np.ndarray]:
    """The picture as large as it is drawn ``[h, w, 3]``, and the cell of each pixel ``[h, w]``."""
    factor = SIDE / max(image.size)
    width, height = (max(round(side * factor), 1) for side in image.size)
    pixels = np.asarray(image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS), dtype=float)
    rows, columns = grid
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    return pixels, y[:, None] * columns + x


def _dimmed(pixels: np.ndarray) -> np.ndarray:
    fade = DARK if pixels.mean() > 96 else LIGHT
    return 0.1 * pixels + 0.1 * pixels.mean(axis=2, keepdims=True) + 0.8 * fade


def _lined(pixels: np.ndarray, labels: np.ndarray, colour: np.ndarray, strength: float) -> np.ndarray:
    """With a line, two pixels wide, wherever labels ``[h, w]`` change."""
    edge = np.zeros(labels.shape, dtype=bool)
    down, across = labels[1:] != labels[:-1], labels[:, 1:] != labels[:, :-1]
    edge[1:] |= down
    edge[:-1] |= down
    edge[:, 1:] |= across
    edge[:, :-1] |= across
    return np.where(edge[..., None], (1 - strength) * pixels + strength * colour, pixels)


def _with_evidence(pixels: np.ndarray, cells: np.ndarray, kept: np.ndarray, evidence: np.ndarray | None) -> Image.Image:
    """The finished picture, with a frame inside of each region of evidence: what is kept of it in one colour, or not."""
    if evidence is not None:
        holds = evidence.ravel()
        for there, colour in ((holds & ~kept, MISSED), (holds & kept, SEEN)):
            region = there[cells]
            inner = region.copy()
            for axis in (0, 1):
                for step in range(1, 4):
                    for sign in (-step, step):
                        inner &= _shifted(region, sign, axis)
            pixels = np.where((region & ~inner)[..., None], colour, pixels)
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def _shifted(mask: np.ndarray, by: int, axis: int) -> np.ndarray:
    """The mask moved by some pixels; nothing comes in from outside."""
    moved = np.roll(mask, by, axis)
    edge: list[slice] = [slice(None)] * 2
    edge[axis] = slice(by) if by > 0 else slice(by, None)
    moved[tuple(edge)] = False
    return moved


def _hue(turn: float) -> np.ndarray:
    return np.array(colormaps["hsv"](turn)[:3]) * 175 + 70
