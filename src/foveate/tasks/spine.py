"""The six spine tasks, about scenes of a few things: questions in words, one right answer each, and what proves it."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .board import choose
from .question import Question, Turn
from .scenes import COLOURS, LETTERS, SHAPES, SIZE, Scene, draw_scene

GRID = 12
"""Rows and columns of the grid in which ``position`` answers are given: the patches of the reference model."""

PATCH = SIZE // GRID
"""Side of a grid cell in pixels."""

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six")
PLURALS = {shape: shape + ("es" if shape == "cross" else "s") for shape in SHAPES}
ROWS = tuple(f"row{i}" for i in range(1, GRID + 1))
COLUMNS = tuple(f"col{i}" for i in range(1, GRID + 1))


@dataclass(frozen=True)
class Asked:
    """A question about a scene: which things (indices) or whether the sign is the evidence for the answer."""

    prompt: str
    answer: str
    things: tuple[int, ...] = ()
    sign: bool = False


Asker = Callable[[Scene, np.random.Generator, tuple[int, int]], Asked | None]
"""Asks one question about a scene whose top left cell is (row, column), or returns None where the scene allows none."""


def ask(task: str, rng: np.random.Generator) -> Question | None:
    """Draw a scene and ask one question of the task about it; None where the scene allows none."""
    kinds = KINDS_OF[task]
    scene = draw_scene(rng, sign_rate=1.0 if task == "reading" else 0.4)
    asked = KINDS[kinds[rng.integers(len(kinds))]](scene, rng, (0, 0))
    if asked is None:
        return None
    evidence = scene.masks[list(asked.things)].any(0) | (scene.sign_mask & asked.sign)
    answers = _near(asked.answer) if task == "position" else (asked.answer,)
    return Question(task, (scene.image,), (Turn(asked.prompt, answers, (evidence,)),))


def _near(cell: str) -> tuple[str, ...]:
    """A cell and its neighbours on the grid: a position may be off by one row and one column."""
    row, column = (int(number) - 1 for number in re.findall(r"\d+", cell))
    rows, columns = (range(max(0, at - 1), min(GRID, at + 2)) for at in (row, column))
    return tuple(dict.fromkeys((cell, *(f"{ROWS[y]} {COLUMNS[x]}" for y in rows for x in columns))))


def _only(values: list[str]) -> list[int]:
    """Indices of the values that occur once."""
    return [i for i, value in enumerate(values) if values.count(value) == 1]


def _spell(rng: np.random.Generator) -> str:
    return choose(rng, ("color", "colour"))


def ask_colour(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """What colour is the star?"""
    if not (options := _only([thing.shape for thing in scene.things])):
        return None
    index = int(rng.choice(options))
    thing, colour = scene.things[index], _spell(rng)
    templates = ("what {} is the {}?", "which {} does the {} have?", "name the {} of the {}.")
    return Asked(choose(rng, templates).format(colour, thing.shape), thing.colour, (index,))


def ask_shape(scene: Scene, rng: np.random.Generator, origin: tuple[int, int]) -> Asked | None:
    """What shape is the red thing?"""
    if not (options := _only([thing.colour for thing in scene.things])):
        return None
    index = int(rng.choice(options))
    thing = scene.things[index]
    templates = ("what shape is the {} thing?", "which shape is {}?", "name the shape of the {} thing.")
    return Asked(choose(rng, templates).format(thing.colour), thing.shape, (index,))


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
    return Asked(choose(rng, templates).format(article, colour, shape), answer, things)


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
    return Asked(choose(rng, templates).format(noun), NUMBERS[len(things)], things)


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
        return choose(rng, absent)
    numbers = sorted({present.count(value) for value in present})
    if numbers == [1] and rng.random() < 0.7:
        return None
    number = rng.choice(numbers)
    return choose(rng, sorted({value for value in present if present.count(value) == number}))


def _ask_position(scene: Scene, rng: np.random.Generator, origin: tuple[int, int], names: list[str]) -> Asked | None:
    if not (options := _only(names)):
        return None
    index = int(rng.choice(options))
    x, y = scene.things[index].centre
    templates = ("where is the {}?", "locate the {}.", "find the {}.")
    # A centre on the far edge of the last cell cannot occur: things have an extent.
    answer = f"{ROWS[origin[0] + int(y // PATCH)]} {COLUMNS[origin[1] + int(x // PATCH)]}"
    return Asked(choose(rng, templates).format(names[index]), answer, (index,))


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
    return Asked(choose(rng, templates), " ".join(scene.sign), sign=True)


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
