"""Six tasks over scenes: questions in words, one right answer each, and the pixels that prove it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .scenes import COLOURS, LETTERS, SHAPES, SIZE, Scene, draw_scene

GRID = 12
"""Rows and columns of the grid in which ``position`` answers are given: the patches of the reference model."""

PATCH = SIZE // GRID
"""Side of a grid cell in pixels."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
ROWS = tuple(f"row{i}" for i in range(1, GRID + 1))
COLUMNS = tuple(f"col{i}" for i in range(1, GRID + 1))

_SPLITS = {"train": 0, "validation": 1, "test": 2}


@dataclass(frozen=True)
class Asked:
    """A question about a scene: which things (indices) or whether the sign is the evidence for the answer."""

    prompt: str
    answer: str
    things: tuple[int, ...] = ()
    sign: bool = False


@dataclass(frozen=True, eq=False)
class Question:
    """A question with its picture.

    ``evidence``: bool ``[H, W]``, the pixels that prove the answer; empty for "no" and "zero".
    """

    task: str
    image: Image.Image
    prompt: str
    answer: str
    evidence: np.ndarray


Asker = Callable[[Scene, np.random.Generator, tuple[int, int]], Asked | None]
"""Asks one question about a scene whose top left cell is (row, column), or returns None where the scene allows none."""


def questions(task: str, n: int, seed: int, split: str = "test") -> list[Question]:
    """``n`` questions of a task, each about a scene of its own; the same for the same arguments, disjoint across splits."""
    return [question(task, seed, index, split) for index in range(n)]


def question(task: str, seed: int, index: int, split: str = "test") -> Question:
    """Question number ``index`` of the stream that ``questions`` reads."""
    if task not in TASKS:
        raise ValueError(f"task={task!r}: must be one of {', '.join(TASKS)}")
    if split not in _SPLITS:
        raise ValueError(f"split={split!r}: must be one of {', '.join(_SPLITS)}")
    rng = np.random.default_rng([_SPLITS[split], seed, TASKS.index(task), index])
    kinds = KINDS_OF[task]
    while True:
        scene = draw_scene(rng, sign_rate=1.0 if task == "reading" else 0.4)
        asked = KINDS[kinds[rng.integers(len(kinds))]](scene, rng, (0, 0))
        if asked is not None:
            evidence = scene.masks[list(asked.things)].any(0) | (scene.sign_mask & asked.sign)
            return Question(task, scene.image, asked.prompt, asked.answer, evidence)


def score(question: Question, prediction: str) -> float:
    """1.0 for a right prediction, else 0.0; case and spacing do not matter, ``position`` allows one cell of error."""
    return float(_right(question.task, question.answer, prediction))


@lru_cache
def majority(task: str) -> str:
    """The constant answer that scores best on the task, estimated on 1,000 validation questions."""
    asked = questions(task, 1000, seed=0, split="validation")
    answers = (
        [f"{row} {column}" for row in ROWS for column in COLUMNS]
        if task == "position"
        else sorted({q.answer for q in asked})
    )
    return max(answers, key=lambda answer: sum(score(q, answer) for q in asked))


def evidence_cells(mask: np.ndarray, rows: int, cols: int, share: float = 0.05) -> np.ndarray:
    """Which cells of a grid over ``mask`` ``[H, W]`` hold at least ``share`` evidence pixels: bool ``[rows, cols]``."""
    height, width = mask.shape
    # Sums over a summed-area table, because the grid need not divide the picture.
    table = np.zeros((height + 1, width + 1))
    table[1:, 1:] = mask.cumsum(0).cumsum(1)
    y = np.linspace(0, height, rows + 1).round().astype(int)
    x = np.linspace(0, width, cols + 1).round().astype(int)
    inside = (
        table[np.ix_(y[1:], x[1:])]
        - table[np.ix_(y[:-1], x[1:])]
        - table[np.ix_(y[1:], x[:-1])]
        + table[np.ix_(y[:-1], x[:-1])]
    )
    area = np.maximum(np.outer(np.diff(y), np.diff(x)), 1)
    return inside / area >= share


def words(text: str) -> list[str]:
    """Lower-case words and punctuation marks of a text: what the tokenizer sees."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def _right(task: str, answer: str, prediction: str) -> bool:
    if task == "position":
        wanted, given = _cell(answer), _cell(prediction)
        return wanted is not None and given is not None and all(abs(a - b) <= 1 for a, b in zip(wanted, given, strict=True))
    joiner = "" if task == "reading" else " "
    return joiner.join(words(answer)) == joiner.join(words(prediction))


def _cell(text: str) -> tuple[int, int] | None:
    match = re.fullmatch(r"row(\d+) col(\d+)", " ".join(words(text)))
    return (int(match[1]), int(match[2])) if match else None


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[rng.integers(len(options))]


def _only(values: list[str]) -> list[int]:
    """Indices of the values that occur once."""
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def _spell(rng: np.random.Generator) -> str:
    return _choose(rng, ("color", "colour"))


def ask_colour(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """What colour is the star?"""
    if not (options := _only([thing.shape for thing in scene.things])):
        return None
    index = int(rng.choice(options))
    thing, colour = scene.things[index], _spell(rng)
    templates = ("what {} is the {}?", "which {} does the {} have?", "name the {} of the {}.")
    return Asked(_choose(rng, templates).format(colour, thing.shape), thing.colour, (index,))


def ask_shape(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """What shape is the red thing?"""
    if not (options := _only([thing.colour for thing in scene.things])):
        return None
    index = int(rng.choice(options))
    thing = scene.things[index]
    templates = ("what shape is the {} thing?", "which shape is {}?", "name the shape of the {} thing.")
    return Asked(_choose(rng, templates).format(thing.colour), thing.shape, (index,))


def ask_existence(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """Is there a red star? Half of the answers are no; mostly both its colour and its shape then are in the scene."""
    if not scene.things:
        return None
    pairs = {(thing.colour, thing.shape) for thing in scene.things}
    if rng.random() < 0.5:
        colour, shape = sorted(pairs)[rng.integers(len(pairs))]
        things = tuple(i for i, thing in enumerate(scene.things) if (thing.colour, thing.shape) == (colour, shape))
        answer = "yes"
    else:
        colour, shape = _absent(rng, pairs)
        things, answer = (), "no"
    templates = ("is there {} {} {}?", "do you see {} {} {}?", "does the image show {} {} {}?")
    article = "an" if colour[0] in "aeiou" else "a"
    return Asked(_choose(rng, templates).format(article, colour, shape), answer, things)


def _absent(rng: np.random.Generator, pairs: set[tuple[str, str]]) -> tuple[str, str]:
    """A colour and shape that do not occur together, both present if possible (swapped), else one of them present."""
    colours, shapes = sorted({c for c, _ in pairs}), sorted({s for _, s in pairs})
    swapped = [(c, s) for c in colours for s in shapes if (c, s) not in pairs]
    near = [(c, s) for c in colours for s in SHAPES] + [(c, s) for c in COLOURS for s in shapes]
    near = [pair for pair in near if pair not in pairs]
    options = swapped if swapped and rng.random() < 0.6 else near
    return options[rng.integers(len(options))]


def _ask_count(rng: np.random.Generator, noun: str, things: tuple[int, ...]) -> Asked:
    templates = ("how many {} are there?", "count the {}.", "how many {} do you see?")
    return Asked(_choose(rng, templates).format(noun), NUMBERS[len(things)], things)


def ask_count_of_shape(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """How many stars are there?"""
    if (shape := _balanced(rng, [thing.shape for thing in scene.things], SHAPES)) is None:
        return None
    return _ask_count(rng, PLURALS[shape], tuple(i for i, thing in enumerate(scene.things) if thing.shape == shape))


def ask_count_of_colour(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """How many red things are there?"""
    if (colour := _balanced(rng, [thing.colour for thing in scene.things], tuple(COLOURS))) is None:
        return None
    return _ask_count(rng, f"{colour} things", tuple(i for i, thing in enumerate(scene.things) if thing.colour == colour))


def ask_count_of_all(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """How many things are there?"""
    return _ask_count(rng, "things", tuple(range(len(scene.things))))


def _balanced(rng: np.random.Generator, present: list[str], every: Sequence[str]) -> str | None:
    """A value to count: absent in 15 % of the cases, else any number that occurs is as likely as any other.

    Most scenes where nothing repeats are passed over (None), or "one" would be the answer half of the time.
    """
    absent = [value for value in every if value not in present]
    if not present or (absent and rng.random() < 0.15):
        return _choose(rng, absent)
    numbers = sorted({present.count(value) for value in present})
    if numbers == [1] and rng.random() < 0.7:
        return None
    number = rng.choice(numbers)
    return _choose(rng, sorted({value for value in present if present.count(value) == number}))


def _ask_position(scene: Scene, rng: np.random.Generator, origin: tuple[int, int], names: list[str]) -> Asked | None:
    if not (options := _only(names)):
        return None
    index = int(rng.choice(options))
    x, y = scene.things[index].centre
    templates = ("where is the {}?", "locate the {}.", "find the {}.")
    # A centre on the far edge of the last cell cannot occur: things have an extent.
    answer = f"{ROWS[origin[0] + int(y // PATCH)]} {COLUMNS[origin[1] + int(x // PATCH)]}"
    return Asked(_choose(rng, templates).format(names[index]), answer, (index,))


def ask_position_of_pair(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """Where is the red star?"""
    return _ask_position(scene, rng, origin, [f"{thing.colour} {thing.shape}" for thing in scene.things])


def ask_position_of_shape(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """Where is the star?"""
    return _ask_position(scene, rng, origin, [thing.shape for thing in scene.things])


def ask_position_of_colour(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """Where is the red thing?"""
    return _ask_position(scene, rng, origin, [f"{thing.colour} thing" for thing in scene.things])


def ask_sign(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """What does the sign say?"""
    if not scene.sign:
        return None
    templates = ("what does the sign say?", "read the sign.", "what is written on the sign?")
    return Asked(_choose(rng, templates), " ".join(scene.sign), sign=True)


KINDS_OF: dict[str, tuple[str, ...]] = {
    "attribute": ("colour",),
    "shape": ("shape",),
    "existence": ("existence",),
    "counting": ("count_of_shape", "count_of_colour", "count_of_all"),
    "position": ("position_of_pair", "position_of_shape", "position_of_colour"),
    "reading": ("sign",),
}
"""The kinds of question that make up each task, in equal shares."""

KINDS: dict[str, Asker] = {kind: globals()[f"ask_{kind}"] for kinds in KINDS_OF.values() for kind in kinds}
TASKS = tuple(KINDS_OF)

VOCABULARY = tuple(
    dict.fromkeys(
        (
            *(*SHAPES, *PLURALS.values(), *COLOURS, *NUMBERS, *ROWS, *COLUMNS, *LETTERS, "yes", "no"),
            *("what", "which", "is", "the", "color", "colour", "does", "have", "name", "of", "shape", "thing", "things"),
            *("there", "a", "an", "do", "you", "see", "image", "show", "how", "many", "are", "count", "where", "locate"),
            *("find", "sign", "say", "read", "written", "on", "says", "and", "in", "picture", "?", ".", ",", "!"),
        )
    )
)
"""Every word that questions, answers and captions use."""
