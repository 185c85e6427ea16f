"""Series of pictures: two to compare, and videos as frames."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from .board import Board, Drawn, Mark, choose, pairs
from .question import Turn
from .scenes import draw_ground, shade

SMALL = 96
"""Side of each picture in pixels."""

ORDINALS = ("first", "second")
FRAMES = tuple(f"frame{number}" for number in range(1, 9))
_STREAM = 12


def _masks(boards: Sequence[Board], *shown: tuple[int, Mark]) -> tuple[np.ndarray, ...]:
    """The evidence in each of several pictures, for (number of the picture, mark)."""
    return tuple(board.mask(*(mark for where, mark in shown if where == number)) for number, board in enumerate(boards))


def compare(rng: np.random.Generator, side: int = SMALL) -> Drawn:
    """Two pictures that share some of their things."""
    names = pairs(rng, 5)
    shared, rest = names[: rng.integers(0, 3)], names[2:]
    boards = (Board(rng, side), Board(rng, side))
    cut = int(rng.integers(0, len(rest) + 1))
    for board, own in zip(boards, (rest[:cut], rest[cut:])):
        board.scatter([*shared, *own], 14, 24)

    def ask(rng: np.random.Generator) -> Turn | None:
        counts = [len(board.marks) for board in boards]
        if rng.random() < 0.3:
            if counts[0] == counts[1]:
                return None
            every = [(number, mark) for number, board in enumerate(boards) for mark in board.marks]
            return Turn("which picture has more things?", (ORDINALS[counts[1] > counts[0]],), _masks(boards, *every))
        shape, colour = names[rng.integers(len(names))]
        name = f"{colour} {shape}"
        shown = [(number, mark) for number, board in enumerate(boards) for mark in board.marks if mark.name == name]
        where = [number for number, _ in shown]
        answer = "both" if len(where) == 2 else ORDINALS[where[0]] if where else "neither"
        return Turn(f"which picture shows the {name}?", (answer,), _masks(boards, *shown))

    return Drawn(boards, ask)


def film(
    rng: np.random.Generator, frames: int, side: int, spans: Mapping[tuple[str, str], tuple[int, int]]
) -> Iterator[Board]:
    """Frames on one ground; each (shape, colour) stands at its place from its first frame up to its last."""
    ground, plan = draw_ground(rng, side)[0], Board(rng, side)
    sides = {name: int(rng.integers(15, 26)) for name in spans}
    paints = {(shape, colour): shade(rng, colour) for shape, colour in spans}
    spots = {name: plan.spot(extent, extent) for name, extent in sides.items()}
    for frame in range(frames):
        board = Board(rng, side, ground + rng.standard_normal(ground.shape, dtype=np.float32))
        for name, (first, last) in spans.items():
            if (spot := spots[name]) is not None and first <= frame <= last:
                board.put(*name, *spot, sides[name], paints[name])
        yield board


def events(rng: np.random.Generator, side: int = SMALL, frames: int = 6) -> Drawn:
    """A video in which three things of different shapes appear one after another, beside one that was always there."""
    shapes: dict[str, tuple[str, str]] = {}
    for shape, colour in pairs(rng, 40):
        shapes.setdefault(shape, (shape, colour))
    still, *coming = list(shapes.values())[:4]
    starts = np.sort(rng.choice(np.arange(1, frames), 3, replace=False)).tolist()
    boards = tuple(film(rng, frames, side, {still: (0, frames), **{name: (at, frames) for name, at in zip(coming, starts)}}))

    def shown(name: tuple[str, str]) -> list[tuple[int, Mark]]:
        return [(n, mark) for n, board in enumerate(boards) for mark in board.marks if (mark.shape, mark.colour) == name]

    seen = [name for name in coming if shown(name)]

    def order(rng: np.random.Generator) -> Turn | None:
        if len(seen) < 3:
            return None
        if rng.random() < 0.5:
            first, second = sorted(rng.permutation(3)[:2].tolist())
            asked = (seen[first][0], seen[second][0]) if rng.random() < 0.5 else (seen[second][0], seen[first][0])
            prompt = f"which came first, the {asked[0]} or the {asked[1]}?"
            return Turn(prompt, (seen[first][0],), _masks(boards, *shown(seen[first]), *shown(seen[second])))
        number = int(rng.integers(2))
        word = ("first", "last")[number]
        name = seen[0] if number == 0 else seen[-1]
        return Turn(f"what came {word}?", (f"{name[1]} {name[0]}",), _masks(boards, *shown(name)))

    return Drawn(boards, order)


def moment(rng: np.random.Generator, side: int = SMALL, frames: int = 6) -> Drawn:
    """A video in which something appears: in which frame?"""
    names = pairs(rng, 3)
    starts = rng.integers(0, frames, 3).tolist()
    boards = tuple(film(rng, frames, side, {name: (at, frames) for name, at in zip(names, starts)}))

    def ask(rng: np.random.Generator) -> Turn | None:
        number = int(rng.integers(len(names)))
        (shape, colour), start = names[number], starts[number]
        found = [mark for mark in boards[start].marks if (mark.shape, mark.colour) == (shape, colour)]
        if not found:
            return None
        prompt = choose(rng, ("when does the {} {} appear?", "in which frame does the {} {} appear?")).format(colour, shape)
        return Turn(prompt, (FRAMES[start],), _masks(boards, (start, found[0])))

    return Drawn(boards, ask)


def stream(rng: np.random.Generator, side: int = SMALL, frames: int = _STREAM) -> Drawn:
    """A long, mostly static video in which one thing is to be seen for a moment only."""
    *still, brief = pairs(rng, int(rng.integers(2, 5)))
    start = int(rng.integers(1, frames - 2))
    spans = {brief: (start, start + int(rng.integers(0, 2))), **dict.fromkeys(still, (0, frames))}
    boards = tuple(film(rng, frames, side, spans))

    def ask(rng: np.random.Generator) -> Turn | None:
        shown = [(n, mark) for n, board in enumerate(boards) for mark in board.marks if (mark.shape, mark.colour) == brief]
        if not shown:
            return None
        prompt = choose(rng, ("what appears for a moment?", "what is there for a moment only?"))
        return Turn(prompt, (f"{brief[1]} {brief[0]}",), _masks(boards, *shown))

    return Drawn(boards, ask)
