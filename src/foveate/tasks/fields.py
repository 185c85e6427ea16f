"""Fields of shapes: many small ones, a single one in a large empty picture, relations, long captions, conversations."""

from __future__ import annotations

import numpy as np

from .board import SIDE, Board, Drawn, Mark, cell, choose, distinct, pairs
from .question import Turn
from .scenes import COLOURS, SHAPES


def _turn(board: Board, prompt: str, answer: str, *marks: Mark) -> Turn:
    return Turn(prompt, (answer,), (board.mask(*marks),))


def _colour(rng: np.random.Generator, board: Board, mark: Mark) -> Turn:
    prompt = choose(rng, ("what colour is the {}?", "what color is the {}?")).format(mark.shape)
    return _turn(board, prompt, mark.colour, mark)


def _shape(rng: np.random.Generator, board: Board, mark: Mark) -> Turn:
    prompt = choose(rng, ("what shape is the {} thing?", "which shape is {}?")).format(mark.colour)
    return _turn(board, prompt, mark.shape, mark)


def _place(rng: np.random.Generator, board: Board, mark: Mark, name: str) -> Turn:
    x, y = mark.centre
    near = [cell(x + dx, y + dy) for dy in (0, -8, 8) for dx in (0, -8, 8) if 0 <= x + dx < SIDE and 0 <= y + dy < SIDE]
    prompt = choose(rng, ("where is the {}?", "find the {}.")).format(name)
    return Turn(prompt, tuple(near), (board.mask(mark),))


def _only(marks: list[Mark], key: str) -> list[Mark]:
    """The marks that share this property with no other."""
    values = [getattr(mark, key) for mark in marks]
    return [mark for mark, value in zip(marks, values) if values.count(value) == 1]


def _pick(rng: np.random.Generator, marks: list[Mark]) -> Mark | None:
    return marks[rng.integers(len(marks))] if marks else None


def dense(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """A crowd of small things, a few of which are the only ones of their shape or colour."""
    board = Board(rng, side)
    shapes, colours = distinct(rng, SHAPES, len(SHAPES)), distinct(rng, tuple(COLOURS), len(COLOURS))
    crowd = [(choose(rng, shapes[2:]), choose(rng, colours[2:])) for _ in range(int(rng.integers(side // 12, side // 7)))]
    lonely = [(shapes[0], choose(rng, colours[2:])), (choose(rng, shapes[2:]), colours[0])]
    marks = board.scatter([*lonely, *crowd], 11, 14)

    def ask(rng: np.random.Generator) -> Turn | None:
        kind = rng.random()
        if kind < 0.35:
            return _colour(rng, board, mark) if (mark := _pick(rng, _only(marks, "shape"))) else None
        if kind < 0.7:
            return _shape(rng, board, mark) if (mark := _pick(rng, _only(marks, "colour"))) else None
        name = marks[rng.integers(len(marks))].name
        if rng.random() < 0.5:
            name = f"{choose(rng, colours)} {choose(rng, shapes)}"
        shown = [mark for mark in marks if mark.name == name]
        article = "an" if name[0] in "aeiou" else "a"
        return _turn(board, f"is there {article} {name}?", "yes" if shown else "no", *shown)

    return Drawn((board,), ask)


def needle(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """One small thing in a large picture that is empty otherwise."""
    board = Board(rng, side)
    (mark,) = board.scatter(pairs(rng, 1), 10, 13)

    def ask(rng: np.random.Generator) -> Turn:
        kind = rng.integers(3)
        if kind == 0:
            return _turn(board, "what colour is the thing?", mark.colour, mark)
        if kind == 1:
            return _turn(board, "what shape is the thing?", mark.shape, mark)
        return _place(rng, board, mark, "thing")

    return Drawn((board,), ask)


_RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}
_EXTREMES = {"leftmost": (0, -1), "rightmost": (0, 1), "topmost": (1, -1), "bottommost": (1, 1)}
_CLEAR = 10
"""Pixels by which things differ along the axis that is asked about."""


def relation(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """Where things are relative to each other."""
    board = Board(rng, side)
    marks = board.scatter(pairs(rng, int(rng.integers(2, 6))), 14, 30 if side >= SIDE else 22)

    def ask(rng: np.random.Generator) -> Turn | None:
        if len(marks) < 2:
            return None
        if rng.random() < 0.6:
            first, second = (marks[i] for i in rng.permutation(len(marks))[:2])
            words = choose(rng, list(_RELATIONS))
            axis, sign = _RELATIONS[words]
            distance = sign * (first.centre[axis] - second.centre[axis])
            prompt = f"is the {first.name} {words} the {second.name}?"
            return _turn(board, prompt, "yes" if distance > 0 else "no", first, second) if abs(distance) > _CLEAR else None
        word = choose(rng, list(_EXTREMES))
        axis, sign = _EXTREMES[word]
        best, other = sorted(marks, key=lambda mark: -sign * mark.centre[axis])[:2]
        if abs(best.centre[axis] - other.centre[axis]) <= _CLEAR:
            return None
        return _turn(board, f"which thing is {word}?", best.name, *marks)

    return Drawn((board,), ask)


def caption(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """Everything there is, from top to bottom: long answers."""
    board = Board(rng, side)
    marks = board.scatter(pairs(rng, int(rng.integers(2, 3 + side // 24))), 14, 24)
    ordered = sorted(marks, key=lambda mark: mark.centre[1])

    def ask(rng: np.random.Generator) -> Turn:
        prompt = choose(rng, ("describe the image.", "describe the picture.", "name the things in the picture."))
        return _turn(board, prompt, " , ".join(mark.name for mark in ordered), *marks)

    return Drawn((board,), ask)


def dialogue(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """Several different things, so that each turn of a conversation can be about another one."""
    board = Board(rng, side)
    count = 4 if side >= SIDE else 2
    shapes, colours = distinct(rng, SHAPES, count), distinct(rng, tuple(COLOURS), count)
    marks = board.scatter(zip(shapes, colours), 14, 30 if side >= SIDE else 24)

    def ask(rng: np.random.Generator) -> Turn | None:
        if (mark := _pick(rng, marks)) is None:
            return None
        kind = rng.integers(3)
        if kind == 0:
            return _colour(rng, board, mark)
        return _shape(rng, board, mark) if kind == 1 else _place(rng, board, mark, mark.shape)

    return Drawn((board,), ask)
