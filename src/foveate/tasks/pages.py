"""Pages: documents of lines and tables, bar charts, and screens with buttons to click."""

from __future__ import annotations

import numpy as np

from .board import CELL, CHARACTERS, DIGITS, SIDE, Board, Box, Drawn, cell, characters, choose, distinct, pairs, spelled
from .question import Turn
from .scenes import COLOURS, LETTERS, shade


def _page(rng: np.random.Generator, side: int) -> Board:
    """A mostly white page."""
    level = np.full((side, side, 3), rng.uniform(225, 255), np.float32)
    if rng.random() < 0.5:
        level += rng.standard_normal(level.shape, dtype=np.float32) * np.float32(rng.uniform(1, 6))
    return Board(rng, side, level)


def document(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """Key-value lines or a table on a page."""
    return _lines(rng, side) if rng.random() < 0.5 else _table(rng, side)


def glance(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """A document with one or two short lines or a table of digits, to learn reading from; not a task of its own."""
    if rng.random() < 0.75:
        return _lines(rng, side, count=int(rng.integers(1, 3)), length=int(rng.integers(1, 3)))
    return _table(rng, side, length=1)


def _lines(rng: np.random.Generator, side: int, count: int | None = None, length: int = 3) -> Drawn:
    board = _page(rng, side)
    count = count or int(rng.integers(2, 1 + side // 30))
    keys, height = distinct(rng, LETTERS, count), int(rng.integers(12, 15))
    left, pitch = int(rng.integers(4, 5 + side // 12)), (side - 6) // count
    values, boxes = {}, {}
    for number, key in enumerate(keys):
        y = 3 + number * pitch + int(rng.integers(0, max(1, pitch - height)))
        values[key] = characters(rng, CHARACTERS, length)
        ink = rng.uniform(0, 70)
        name = board.write(f"{key}:", left, y, height, ink)
        at = left + 24 + int(rng.integers(0, max(1, side - left - 24 - 40)))
        value = board.write(values[key], at, y, height, ink)
        boxes[key] = (name, value)
        if rng.random() < 0.3:
            board.fill((left, min(side - 1, y + height + 2), side - 2 * left, 1), 170)

    def ask(rng: np.random.Generator) -> Turn:
        key = choose(rng, keys)
        prompt = choose(rng, ("what does line {} say?", "read line {}.", "what is written on line {}?")).format(key)
        return Turn(prompt, (spelled(values[key]),), (board.mask(*boxes[key]),))

    return Drawn((board,), ask)


def _table(rng: np.random.Generator, side: int, length: int = 2) -> Drawn:
    board = _page(rng, side)
    most = 2 + side // 96
    rows, columns = int(rng.integers(2, most + 1)), int(rng.integers(2, most + 1))
    names = distinct(rng, LETTERS, rows + columns)
    height, ink = int(rng.integers(11, 14)), rng.uniform(0, 60)
    wide, high = side // (columns + 1), min(side // (rows + 1), 34)
    top = int(rng.integers(0, side - high * (rows + 1) + 1))
    if rng.random() < 0.8:
        for row in range(rows + 2):
            board.fill((0, min(side - 1, top + row * high), side, 1), 150)
        for column in range(1, columns + 1):
            board.fill((column * wide, top, 1, high * (rows + 1)), 150)

    def write(text: str, row: int, column: int) -> Box:
        return board.write(text, column * wide + wide // 2 - 8, top + row * high + (high - height) // 2 + 1, height, ink)

    heads = {name: write(name, row + 1, 0) for row, name in enumerate(names[:rows])}
    heads |= {name: write(name, 0, column + 1) for column, name in enumerate(names[rows:])}
    values = {(row, column): characters(rng, DIGITS, length) for row in names[:rows] for column in names[rows:]}
    order = {name: number + 1 for part in (names[:rows], names[rows:]) for number, name in enumerate(part)}
    boxes = {at: write(value, order[at[0]], order[at[1]]) for at, value in values.items()}

    def ask(rng: np.random.Generator) -> Turn:
        row, column = choose(rng, names[:rows]), choose(rng, names[rows:])
        prompt = choose(rng, ("what is in row {} column {}?", "read row {} column {}.")).format(row, column)
        evidence = board.mask(heads[row], heads[column], boxes[row, column])
        return Turn(prompt, (spelled(values[row, column]),), (evidence,))

    return Drawn((board,), ask)


def chart(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """Bars in different colours over a scale."""
    board = _page(rng, side)
    top = 9 if side >= SIDE else 5
    unit = (side - 12) // (top + 1)
    colours = distinct(rng, tuple(COLOURS), int(rng.integers(2, 4 + side // SIDE * 3)))
    heights = {colour: int(rng.integers(1, top + 1)) for colour in colours}
    base, left = side - 8, 18
    for level in range(1, top + 1):
        if rng.random() < 0.9:
            board.fill((left, base - level * unit, side - left - 2, 1), 185)
        board.write(str(level), 3, base - level * unit - 4, 11, 40)
    board.fill((left, base, side - left - 2, 2), 60)
    pitch = (side - left - 4) // len(colours)
    bars: dict[str, Box] = {}
    for number, colour in enumerate(colours):
        wide = int(rng.integers(max(8, pitch // 2), max(9, pitch - 3)))
        tall = heights[colour] * unit
        bars[colour] = (left + 3 + number * pitch + int(rng.integers(0, max(1, pitch - wide))), base - tall, wide, tall)
        board.fill(bars[colour], shade(rng, colour))

    def ask(rng: np.random.Generator) -> Turn | None:
        kind = rng.random()
        if kind < 0.5:
            colour = choose(rng, colours)
            scale = (0, max(0, bars[colour][1] - 6), 16, 12)
            prompt = choose(rng, ("how high is the {} bar?", "what is the value of the {} bar?")).format(colour)
            return Turn(prompt, (str(heights[colour]),), (board.mask(bars[colour], scale),))
        if kind < 0.75:
            ranked = sorted(colours, key=heights.__getitem__, reverse=rng.random() < 0.5)
            if heights[ranked[0]] == heights[ranked[1]]:
                return None
            word = "highest" if heights[ranked[0]] > heights[ranked[1]] else "lowest"
            return Turn(f"which bar is the {word}?", (ranked[0],), (board.mask(*bars.values()),))
        first, second = distinct(rng, colours, 2)
        if heights[first] == heights[second]:
            return None
        answer = "yes" if heights[first] > heights[second] else "no"
        evidence = board.mask(bars[first], bars[second])
        return Turn(f"is the {first} bar higher than the {second} bar?", (answer,), (evidence,))

    return Drawn((board,), ask)


def screen(rng: np.random.Generator, side: int = SIDE) -> Drawn:
    """Buttons with words and icons in a window; the answer to an instruction is a cell inside the right one."""
    dark = bool(rng.random() < 0.35)
    level, ink = (rng.uniform(25, 60), rng.uniform(215, 250)) if dark else (rng.uniform(205, 245), rng.uniform(0, 50))
    board = Board(rng, side, np.full((side, side, 3), level, np.float32))
    if rng.random() < 0.6:
        board.fill((0, 0, side, 14), np.array([70, 110, 180], np.float32) if rng.random() < 0.5 else 120)
        board.taken.append((0, 0, side, 15))
    face = level + (20 if dark else -22)
    targets: dict[str, Box] = {}
    icons = iter(pairs(rng, 12))
    for _ in range(int(rng.integers(2, 3 + side // 32))):
        if rng.random() < 0.5:
            word, height = characters(rng, LETTERS, 3), int(rng.integers(11, 14))
            # Written once beside the picture to know how wide it is.
            width = Board(rng, 96, np.zeros((96, 96, 3), np.float32)).write(word, 0, 0, height, 0)[2] + 10
            if (found := board.spot(width, height + 8)) is not None:
                box = (*found, width, height + 8)
                board.fill(box, face, border=ink)
                board.write(word, box[0] + 5, box[1] + 5, height, ink)
                targets[spelled(word)] = box
        elif (found := board.spot(extent := int(rng.integers(20, 29)), extent)) is not None:
            shape, colour = next(icons)
            board.fill((*found, extent, extent), face, border=ink)
            board.put(shape, colour, found[0] + 4, found[1] + 4, extent - 8)
            targets[f"{colour} {shape}"] = (*found, extent, extent)

    def ask(rng: np.random.Generator) -> Turn | None:
        if not targets:
            return None
        name = choose(rng, list(targets))
        prompt = choose(rng, ("click {}.", "click on {}.", "click the button {}.")).format(name)
        return Turn(prompt, _inside(targets[name]), (board.mask(targets[name]),))

    return Drawn((board,), ask)


def _inside(box: Box) -> tuple[str, ...]:
    """The cells whose centres lie in a box, the one in its middle first."""
    x, y, width, height = box
    places = [
        (column, row)
        for row in range(CELL // 2, SIDE, CELL)
        for column in range(CELL // 2, SIDE, CELL)
        if x <= column < x + width and y <= row < y + height
    ]
    return tuple(dict.fromkeys((cell(x + width / 2, y + height / 2), *(cell(*place) for place in places))))
