"""Training batches: many questions packed behind one picture, or behind a window of the picture's patch grid.

A window is a square of grid cells. Only its patches are fed, with the position embeddings of the cells they would have
in the full picture, so that training on small windows teaches every row of the position table and every position word.
Text is packed in blocks: a block is a conversation of one or more turns that sees the picture and itself only.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch

from foveate.reference.model import ASSISTANT, END, PAD, TOKEN_IDS, USER
from foveate.tasks.metrics import words
from foveate.tasks.scenes import COLOURS, LETTERS, SHAPES, Scene, draw_scene
from foveate.tasks.spine import GRID, KINDS, PATCH, Asked

KIND_NAMES = tuple(KINDS)
IGNORE = -100
CAPTION_LENGTH = 40
_NEXT_TURN_RATE = 0.15


@dataclass(frozen=True)
class Window:
    """A square of ``cells`` x ``cells`` patches with up to ``most`` things; ``images`` per batch, ``text`` tokens each.

    Without text the encoder is trained alone. A ``loose`` window's patches take any ascending places in the decoder, in half
    of the pictures without a gap, and the text starts right behind: where a thing is must then be read from the patches
    themselves, as it must be once a method has dropped tokens and renumbered the rest.
    """

    cells: int
    images: int
    text: int
    most: int
    loose: bool = False


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; ``B`` images, ``C`` cells in a window, ``T`` text tokens.

    ``pixels`` uint8 ``[B, side, side, 3]``; ``cells`` ``[B, C]``: index of each patch in the full grid;
    ``places`` ``[B, C]``: its position in the decoder.
    ``ids``, ``blocks`` (0 for padding), ``targets`` (the next token where it is part of an answer, else ``IGNORE``),
    ``positions`` and ``turns`` (index into ``kinds`` where a target stands, else -1): ``[B, T]``.
    ``kinds`` ``[turns]``: index of each question's kind. ``captions`` ``[B, CAPTION_LENGTH]``.
    ``shapes``, ``colours``, ``letters`` ``[B, C]``: what a patch shows; the class after the last means nothing.
    ``sketches`` bool ``[B, C, PATCH * PATCH]``: which pixels of a patch belong to a thing or a letter.
    """

    pixels: torch.Tensor
    cells: torch.Tensor
    places: torch.Tensor
    ids: torch.Tensor
    blocks: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    turns: torch.Tensor
    kinds: torch.Tensor
    captions: torch.Tensor
    shapes: torch.Tensor
    colours: torch.Tensor
    letters: torch.Tensor
    sketches: torch.Tensor

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        return Batch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def draw_batch(seed: int, step: int, window: Window, shares: tuple[float, ...]) -> Batch:
    """The batch of a step: a function of its arguments alone. ``shares``: how often each kind of question is asked."""
    rng = np.random.default_rng([seed, 3, step])
    text = _PackedText(window.images, window.text)
    pixels, cells, places, captions, names, sketches = [], [], [], [], [], []
    for row in range(window.images):
        scene = draw_scene(rng, window.cells * PATCH, window.most)
        origin = (int(rng.integers(GRID - window.cells + 1)), int(rng.integers(GRID - window.cells + 1)))
        pixels.append(scene.pixels)
        cells.append(_cells(origin, window.cells))
        captions.append(_caption(scene, rng))
        names.append(patch_names(scene))
        sketches.append(_sketch(scene))
        places.append(_loose_places(rng, window.cells**2) if window.loose else cells[-1] + 1)
        behind = int(places[-1][-1]) + 1 if window.loose else GRID**2 + 1
        text.fill(row, scene, origin, rng, shares, behind)
    shapes, colours, letters = np.stack(names, axis=1)
    arrays = {
        "pixels": np.stack(pixels),
        "cells": np.stack(cells),
        "places": np.stack(places),
        "captions": np.array(captions),
        "shapes": shapes,
        "colours": colours,
        "letters": letters,
        "sketches": np.stack(sketches),
        "kinds": np.array(text.kinds, np.int64),
        **{name: getattr(text, name) for name in ("ids", "blocks", "targets", "positions", "turns")},
    }
    return Batch(**{name: torch.from_numpy(array) for name, array in arrays.items()})


class _PackedText:
    """The text arrays of a batch, ``[images, length]`` each, as ``Batch`` describes them, while they are being filled."""

    def __init__(self, images: int, length: int) -> None:
        self.ids = np.full((images, length), TOKEN_IDS[PAD])
        self.blocks = np.zeros((images, length), np.int64)
        self.positions = np.zeros((images, length), np.int64)
        self.targets = np.full((images, length), IGNORE)
        self.turns = np.full((images, length), -1)
        self.kinds: list[int] = []

    def fill(
        self,
        row: int,
        scene: Scene,
        origin: tuple[int, int],
        rng: np.random.Generator,
        shares: tuple[float, ...],
        behind: int,
    ) -> None:
        """Ask about the scene until the row is full, or until little that is new can be asked.

        ``behind``: position of the first token after the picture.
        """
        start, block, position = 0, 0, 0
        seen: set[object] = set()
        for kind in rng.choice(len(KIND_NAMES), size=60, p=shares):
            asked = KINDS[KIND_NAMES[kind]](scene, rng, origin)
            if asked is None or (key := (kind, asked.things, asked.answer) if asked.things else asked.prompt) in seen:
                continue
            seen.add(key)
            follows = block > 0 and rng.random() < _NEXT_TURN_RATE
            question, answer = _turn(asked, follows)
            asking, stop = start + len(question), start + len(question) + len(answer)
            if stop > self.ids.shape[1]:
                break
            if not follows:
                block, position = block + 1, behind
            self.ids[row, start:stop] = question + answer
            self.blocks[row, start:stop] = block
            self.positions[row, start:stop] = np.arange(position, position + stop - start)
            self.targets[row, asking - 1 : stop - 1] = answer
            self.turns[row, asking - 1 : stop - 1] = len(self.kinds)
            self.kinds.append(int(kind))
            start, position = stop, position + stop - start


def _turn(asked: Asked, follows: bool) -> tuple[list[int], list[int]]:
    """Token ids of a question up to the assistant's mark, and of its answer.

    The first turn of a conversation has its user mark before the picture.
    """
    question = [TOKEN_IDS[word] for word in words(asked.prompt)] + [TOKEN_IDS[ASSISTANT]]
    answer = [TOKEN_IDS[word] for word in words(asked.answer)] + [TOKEN_IDS[END]]
    return ([TOKEN_IDS[USER], *question] if follows else question), answer


def _cells(origin: tuple[int, int], side: int) -> np.ndarray:
    """Raster index in the full grid of each cell of a window: ``[side * side]``."""
    rows, columns = np.arange(side) + origin[0], np.arange(side) + origin[1]
    return (rows[:, None] * GRID + columns).ravel()


def _loose_places(rng: np.random.Generator, count: int) -> np.ndarray:
    """Ascending decoder positions of a loose window's patches: ``[count]``."""
    span = count if rng.random() < 0.5 else int(rng.integers(count, GRID**2 + 1))
    return np.sort(rng.choice(span, count, replace=False)) + 1


def _caption(scene: Scene, rng: np.random.Generator) -> list[int]:
    """Token ids of a text that goes with the scene, cut and padded to ``CAPTION_LENGTH``.

    Mostly a list of all there is in random order; also one entry of it, or a question, since questions are what methods
    compare pictures with.
    """
    parts = [f"a {thing.colour} {thing.shape}" for thing in scene.things]
    if scene.sign:
        parts.append("the sign " + " ".join(scene.sign))
    text = " and ".join(parts[i] for i in rng.permutation(len(parts)))
    kind = rng.random()
    if kind < 0.2:
        text = parts[rng.integers(len(parts))]
    elif kind < 0.4 and (asked := KINDS["position_of_pair"](scene, rng, (0, 0))) is not None:
        text = asked.prompt
    ids = [TOKEN_IDS[word] for word in words(text)[: CAPTION_LENGTH - 1]]
    return [*ids, TOKEN_IDS[END], *[TOKEN_IDS[PAD]] * (CAPTION_LENGTH - 1 - len(ids))]


def patch_names(scene: Scene) -> np.ndarray:
    """Index of the shape, colour and letter that each patch shows: ``[3, C]``; one past the last name for none."""
    shape_of = [SHAPES.index(thing.shape) for thing in scene.things] + [len(SHAPES)]
    colour_of = [list(COLOURS).index(thing.colour) for thing in scene.things] + [len(COLOURS)]
    letter_of = [LETTERS.index(letter) for letter in scene.sign or LETTERS[:3]] + [len(LETTERS)]
    thing, letter = _most_seen(scene.masks, 0.1), _most_seen(scene.letter_masks, 0.05)
    return np.stack([np.array(shape_of)[thing], np.array(colour_of)[thing], np.array(letter_of)[letter]])


def _sketch(scene: Scene) -> np.ndarray:
    """Which pixels of each patch show a thing or a letter: bool ``[C, PATCH * PATCH]``."""
    shown = scene.masks.any(0) | scene.letter_masks.any(0)
    side = len(shown) // PATCH
    return shown.reshape(side, PATCH, side, PATCH).transpose(0, 2, 1, 3).reshape(side * side, PATCH * PATCH)


def _most_seen(masks: np.ndarray, share: float) -> np.ndarray:
    """Index of the mask with most pixels in each patch, or the number of masks where none reaches ``share``: ``[C]``."""
    count, side, _ = masks.shape
    if count == 0:
        return np.zeros((side // PATCH) ** 2, np.int64)
    seen = masks.reshape(count, side // PATCH, PATCH, side // PATCH, PATCH).mean((2, 4)).reshape(count, -1)
    return np.where(seen.max(0) >= share, seen.argmax(0), count)
