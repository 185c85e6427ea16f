"""Lessons for the larger reference models: pictures of one task at one size, many questions packed behind each.

Text is packed in blocks: a block is a conversation of one or more turns that sees the pictures and itself only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch

from foveate.reference.model import ASSISTANT, END, IMAGE, PAD, USER
from foveate.tasks import DRAWN, SPINE, Turn
from foveate.tasks.board import CELL, CHARACTERS, Board, Drawn, Mark, cell
from foveate.tasks.metrics import words
from foveate.tasks.pages import document, glance, screen
from foveate.tasks.scenes import COLOURS, SHAPES, Scene, draw_scene
from foveate.tasks.spine import KINDS as SPINE_KINDS
from foveate.tasks.spine import KINDS_OF

from .extended import IDS, KINDS, Kind

IGNORE = -100
NAMES: tuple[Sequence[str], ...] = (SHAPES, tuple(COLOURS), CHARACTERS)
"""What a cell may show: a shape, a colour, a character; the class after the last of each means none."""
_NEXT_TURN_RATE = 0.2
_LEAST = (0.1, 0.1, 0.05)
"""Share of a cell's pixels from which on it shows the shape, the colour, the character."""


@dataclass(frozen=True)
class Lesson:
    """A task in pictures of ``side`` pixels, so many to a batch, with ``text`` tokens behind each."""

    task: str
    side: int
    pictures: int
    text: int


@dataclass(frozen=True)
class Batch:
    """Tensors of one training step; ``B`` samples with ``V`` visual tokens each, ``T`` text tokens.

    ``vision``: what the model's ``get_image_features`` takes. ``prefix`` ``[P]``: the ids before the text, the same for all.
    ``ids``, ``blocks`` (0 for padding), ``targets`` (the next token where it is part of an answer, else ``IGNORE``),
    ``places`` (how far behind the prefix) and ``turns`` (number of the question where a target stands, else -1): ``[B, T]``.
    ``names`` ``[3, B, V, S]``: shape, colour and character that each of a token's ``S`` cells shows, ``IGNORE`` where nobody
    knows. ``rows``, ``columns`` ``[B, V]``: of the token's first cell.
    """

    vision: dict[str, torch.Tensor]
    prefix: torch.Tensor
    ids: torch.Tensor
    blocks: torch.Tensor
    targets: torch.Tensor
    places: torch.Tensor
    turns: torch.Tensor
    names: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor

    @property
    def shown(self) -> torch.Tensor:
        """Whether a cell shows a shape, a colour or a character: bool ``[B, V, S]``."""
        nothing = torch.tensor([len(names) for names in NAMES], device=self.names.device)
        return ((self.names != nothing[:, None, None, None]) & (self.names != IGNORE)).any(0)

    def to(self, device: str) -> Batch:
        """The same batch on a device."""
        moved = {field.name: getattr(self, field.name) for field in fields(self)}
        vision = {name: tensor.to(device) for name, tensor in moved.pop("vision").items()}
        return Batch(vision, **{name: tensor.to(device) for name, tensor in moved.items()})


def draw_batch(kind: str, lesson: Lesson, seed: int, step: int) -> Batch:
    """The batch of a step: a function of its arguments alone."""
    rng = np.random.default_rng([seed, 5, step])
    model = KINDS[kind]
    drawn = [_draw(lesson, rng) for _ in range(lesson.pictures)]
    images = [image for each in drawn for image in each.images]
    vision = {name: torch.as_tensor(value) for name, value in _processor(kind)(images, return_tensors="pt").items()}
    labels = [_labels(model, board) for each in drawn for board in each.boards]
    count = len(labels) // len(drawn)
    names, rows, columns = (torch.from_numpy(np.stack(part)) for part in zip(*labels, strict=True))
    return Batch(
        vision=vision,
        prefix=_prefix(model, count, names.shape[2]),
        names=names.unflatten(0, (len(drawn), count)).permute(2, 0, 1, 3, 4).flatten(2, 3),
        rows=rows.unflatten(0, (len(drawn), count)).flatten(1),
        columns=columns.unflatten(0, (len(drawn), count)).flatten(1),
        **_pack(drawn, lesson.text, rng),
    )


_PROCESSORS: dict[str, Callable[..., dict[str, torch.Tensor]]] = {}


def _processor(kind: str) -> Callable[..., dict[str, torch.Tensor]]:
    if kind not in _PROCESSORS:
        _PROCESSORS[kind] = KINDS[kind].processor().image_processor
    return _PROCESSORS[kind]


def _prefix(model: Kind, pictures: int, tokens: int) -> torch.Tensor:
    image = [IDS[IMAGE]] * tokens
    if model.around:
        before, behind = (IDS[word] for word in model.around)
        image = [before, *image, behind]
    return torch.tensor([IDS[USER], *image * pictures])


def _draw(lesson: Lesson, rng: np.random.Generator) -> Drawn:
    """Pictures about which at least something can be asked."""
    draw = _EXERCISES.get(lesson.task) or DRAWN[lesson.task]
    while True:
        drawn = draw(rng, lesson.side)
        if any(drawn.ask(rng) is not None for _ in range(8)):
            return drawn


def _spine(rng: np.random.Generator, side: int) -> Drawn:
    """A scene of the small reference model, with all kinds of questions."""
    scene = draw_scene(rng, side, sign_rate=0.5)
    board = Board(rng, side, scene.pixels.astype(np.float32))
    board.marks = _scene_marks(scene)
    kinds = [kind for task in SPINE for kind in KINDS_OF[task]]
    # Each task as often as any other.
    shares = np.array([1 / len(KINDS_OF[task]) for task in SPINE for _ in KINDS_OF[task]])

    def ask(rng: np.random.Generator) -> Turn | None:
        asked = SPINE_KINDS[kinds[rng.choice(len(kinds), p=shares / shares.sum())]](scene, rng, (0, 0))
        return None if asked is None else Turn(asked.prompt, (asked.answer,))

    return Drawn((board,), ask)


def _scene_marks(scene: Scene) -> list[Mark]:
    things = [Mark(0, 0, mask, thing.shape, thing.colour) for thing, mask in zip(scene.things, scene.masks, strict=True)]
    return things + [Mark(0, 0, mask, letter=letter) for letter, mask in zip(scene.sign, scene.letter_masks)]


def _characters(rng: np.random.Generator, side: int) -> Drawn:
    """A page or a screen of which single characters are asked by their place."""
    drawn = (document if rng.random() < 0.6 else screen)(rng, side)
    marks = [mark for mark in drawn.boards[0].marks if mark.letter in CHARACTERS and mark.letter]

    def ask(rng: np.random.Generator) -> Turn | None:
        if not marks:
            return None
        mark = marks[rng.integers(len(marks))]
        return Turn(f"read {cell(*mark.centre)}.", (mark.letter,))

    return Drawn(drawn.boards, ask)


_EXERCISES: dict[str, Callable[[np.random.Generator, int], Drawn]] = {
    "spine": _spine,
    "characters": _characters,
    "glance": glance,
}
"""What is taught and is no task itself."""


def _labels(model: Kind, board: Board) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Names ``[3, V, S]``, rows and columns ``[V]`` of a picture's visual tokens."""
    if not model.tiled:
        merged = _cells(board, CELL)
        side = merged.shape[1] // 2
        names = merged.reshape(3, side, 2, side, 2).transpose(0, 1, 3, 2, 4).reshape(3, side * side, 4)
        row, column = np.divmod(np.arange(side * side), side)
        return names, 2 * row, 2 * column
    coarse, fine = _cells(board, board.side // 12), _cells(board, CELL)
    if board.side // 12 > CELL:
        # Half as large, letters cannot be told apart.
        coarse[2] = IGNORE
    # Behind each line of details stands a token that shows nothing.
    fine = np.pad(fine, ((0, 0), (0, 0), (0, 1)), constant_values=IGNORE)
    lines = np.arange(fine.shape[1])
    row, column = np.divmod(np.arange(144), 12)
    rows = np.concatenate([row * board.side // 96, lines.repeat(len(lines) + 1)])
    columns = np.concatenate([column * board.side // 96, np.tile([*lines, 0], len(lines))])
    return np.concatenate([coarse.reshape(3, -1, 1), fine.reshape(3, -1, 1)], 1), rows, columns


def _cells(board: Board, cell: int) -> np.ndarray:
    """What each cell of ``cell`` pixels shows most of: class numbers ``[3, side, side]``."""
    side = board.side // cell
    counts = [np.zeros((len(names) + 1, side * side)) for names in NAMES]
    for mark in board.marks:
        y, x = mark.ink.nonzero()
        where = np.bincount(((y + mark.y) // cell) * side + (x + mark.x) // cell, minlength=side * side)
        for count, names, name in zip(counts, NAMES, (mark.shape, mark.colour, mark.letter), strict=True):
            if name in names and name:
                count[names.index(name)] += where
    for count, least in zip(counts, _LEAST, strict=True):
        count[-1] = least * cell * cell
    return np.stack([count.argmax(0).reshape(side, side) for count in counts])


def _pack(drawn: Sequence[Drawn], length: int, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    shape = (len(drawn), length)
    ids, blocks, places = np.full(shape, IDS[PAD]), np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    targets, turns = np.full(shape, IGNORE), np.full(shape, -1)
    number = 0
    for row, each in enumerate(drawn):
        start = block = place = 0
        seen: set[str] = set()
        for _ in range(60):
            turn = each.ask(rng)
            if turn is None or turn.prompt in seen:
                continue
            seen.add(turn.prompt)
            follows = block > 0 and rng.random() < _NEXT_TURN_RATE
            asked = [*([IDS[USER]] if follows else []), *_ids(turn.prompt), IDS[ASSISTANT]]
            answer = [*_ids(turn.answers[0]), IDS[END]]
            middle, stop = start + len(asked), start + len(asked) + len(answer)
            if stop > length:
                break
            if not follows:
                block, place = block + 1, 0
            ids[row, start:stop] = asked + answer
            blocks[row, start:stop] = block
            places[row, start:stop] = np.arange(place, place + stop - start)
            targets[row, middle - 1 : stop - 1] = answer
            turns[row, middle - 1 : stop - 1] = number
            number, start, place = number + 1, stop, place + stop - start
    arrays = {"ids": ids, "blocks": blocks, "places": places, "targets": targets, "turns": turns}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _ids(text: str) -> list[int]:
    return [IDS[word] for word in words(text)]
