"""What became of a picture's tokens under one recipe, or under two side by side: as PNG and as a self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill, shorten
from typing import Any

import jinja2
import numpy as np
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from PIL import Image

from foveate.report.overlay import MISSED, SEEN, beside, bounds, heat, merged, overlay, scaled
from foveate.report.stages import Grids, Stage, Story

MOST_RANKINGS = 2
"""Heat maps of one stage; of more rankings the last ones are shown."""


@dataclass(frozen=True, eq=False)
class Inspection:
    """One request under one recipe.

    Attributes:
        recipe: as text.
        answer: what the model said.
        story: what became of the tokens.
        recalls: share of the evidence alive behind each stage, None where nobody knows.
    """

    recipe: str
    answer: str
    story: Story
    recalls: tuple[float | None, ...]


@dataclass(frozen=True, eq=False)
class Subject:
    """What was asked.

    Attributes:
        pictures: as the model was shown them.
        prompt, expected: the question, and its answer if it is known.
        model: name of the model.
        evidence: for each grid bool ``[rows, columns]``, the cells that prove the answer; ``()`` where nobody knows.
    """

    pictures: tuple[Image.Image, ...]
    prompt: str
    model: str
    expected: str = ""
    evidence: tuple[np.ndarray, ...] = ()


@dataclass(frozen=True, eq=False)
class Drawing:
    """One picture and what it shows."""

    caption: str
    image: Image.Image

    @property
    def uri(self) -> str:
        """The picture as a data URI."""
        buffer = io.BytesIO()
        self.image.save(buffer, format="WEBP", quality=88)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@dataclass(frozen=True, eq=False)
class Card:
    """A stage, drawn."""

    title: str
    method: str
    tokens: str
    recall: float | None
    note: str
    drawings: tuple[Drawing, ...]
    by_layer: tuple[Drawing, ...] = ()


Column = tuple[Inspection, list[Card]]
"""An inspection and its stages, drawn."""


def cards(inspection: Inspection, subject: Subject) -> list[Card]:
    """The stages of an inspection, drawn."""
    drawer = _Drawer(inspection.story, subject)
    return [
        Card(
            title=stage.title,
            method=stage.method,
            tokens=tokens(stage),
            recall=recall,
            note=stage.note,
            drawings=tuple(drawer.stage(stage)),
            by_layer=tuple(Drawing(name, drawer.small(stage, shares)) for name, shares in stage.by_layer),
        )
        for stage, recall in zip(inspection.story.stages, inspection.recalls, strict=True)
    ]


def tokens(stage: Stage) -> str:
    """``36 of 144 tokens (25 %)``."""
    count = f"{stage.count:.1f}".removesuffix(".0")
    return f"{count} of {stage.total} tokens ({stage.count / stage.total:.0%})".replace("%", " %")


class _Drawer:
    """Draws stages over the pictures of one story."""

    def __init__(self, story: Story, subject: Subject) -> None:
        self._story = story
        self._pictures = [subject.pictures[number] for number in story.pictures]
        self._evidence: Sequence[np.ndarray | None] = subject.evidence or [None] * len(story.grids)

    def stage(self, stage: Stage) -> Iterator[Drawing]:
        """The survivors or shares, then what they were ranked by."""
        if stage.share is not None:
            yield Drawing("dark: 0 %, yellow: 100 %", self.shares(stage, stage.share))
        elif stage.merged:
            yield Drawing("one colour: one token", self._each(merged, stage.fate))
        else:
            yield Drawing("clear: kept", self._each(overlay, stage.alive))
        rankings = stage.scores[-MOST_RANKINGS:]
        for number, scores in enumerate(rankings, start=1):
            low, high = bounds(scores)
            which = f"score {number}" if len(rankings) > 1 else "score"
            kept = stage.alive if stage.share is None else None
            colours = tuple(scaled(of_grid, low, high) for of_grid in scores)
            yield Drawing(f"{which}: {low:.2g} (dark) to {high:.2g}", self.heat(colours, kept))

    def shares(self, stage: Stage, shares: Grids) -> Image.Image:
        """Shares of 0 to 1; tokens that were merged have the share of what they live on in."""
        spread = tuple(np.where(fate >= 0, share[fate], np.nan) for share, fate in zip(shares, stage.fate))
        return self.heat(spread)

    def small(self, stage: Stage, shares: Grids) -> Image.Image:
        """The same for one layer among many."""
        drawn = self.shares(stage, shares)
        return drawn.resize((drawn.width // 3, drawn.height // 3), Image.Resampling.BOX)

    def heat(self, values: Grids, kept: Grids | None = None) -> Image.Image:
        """A heat map over every grid."""
        marks = kept or [None] * len(values)
        drawn = [
            heat(picture, grid, of_grid, evidence, mark)
            for picture, grid, of_grid, evidence, mark in zip(
                self._pictures, self._story.grids, values, self._evidence, marks, strict=True
            )
        ]
        return beside(drawn)

    def _each(self, draw: Callable[..., Image.Image], arrays: Grids) -> Image.Image:
        zipped = zip(self._pictures, self._story.grids, arrays, self._evidence, strict=True)
        return beside([draw(*of_grid) for of_grid in zipped])


# The page.


def page(columns: Sequence[Column], subject: Subject) -> str:
    """A page that needs nothing but itself."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("foveate.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("inspection.html.j2").render(
        subject=subject,
        columns=columns,
        seen=to_hex((SEEN / 255).tolist()),
        missed=to_hex((MISSED / 255).tolist()),
    )


# The PNG.

_WIDTH, _GAP = 8.0, 0.14
"""Inches; at the 800 pixels of a README's column, nine points are letters of twelve pixels."""
_LETTER, _ROW = 0.0077, 0.0187
"""Width of a letter and height of a row of text, in inches for each point of its size."""
_MOST_LETTERS = 400
"""Of a prompt or an answer."""


def figure(drawn: Sequence[Column], subject: Subject) -> Figure:
    """Both recipes below each other, stage by stage; what a stage ranked by follows what it left."""
    widest = max(d.image.width / d.image.height for _, of_one in drawn for card in of_one for d in card.drawings)
    # Several grids beside each other want the room of several pictures.
    across = 3 if widest < 1.6 else 2 if widest < 3.2 else 1
    sheet = _Sheet((_WIDTH - _GAP) / across - _GAP)
    sheet.write(subject.prompt, 13, fontweight="bold")
    said = f"right answer: {subject.expected}; " if subject.expected else ""
    key = "; evidence: cyan is still there, red is lost" if subject.evidence else ""
    sheet.write(f"{said}{subject.model}{key}", 9, color="#555555")
    for inspection, of_one in drawn:
        sheet.skip(0.1)
        sheet.write(f"{inspection.recipe}  →  {inspection.answer or '–'}", 11, color="#0b5cad")
        panels = [panel for card in of_one for panel in _panels(card)]
        for start in range(0, len(panels), across):
            sheet.row(panels[start : start + across])
    return sheet.figure()


def _panels(card: Card) -> Iterator[tuple[Sequence[str], Drawing]]:
    """The drawings of a stage, each with the lines above it."""
    who = f"{card.method}: " if card.method else ""
    known = "" if card.recall is None else f", evidence {card.recall:.0%}".replace("%", " %")
    for number, drawing in enumerate(card.drawings):
        said = f"{who}{card.tokens}{known}" if number == 0 else f"{who}what it ranked by"
        yield (card.title, said, *([card.note] if card.note and number == 0 else [])), drawing


class _Sheet:
    """A figure that is filled from top to bottom; as high as it has become."""

    def __init__(self, panel: float) -> None:
        """``panel`` is how wide a drawing is, in inches."""
        self._panel = panel
        self._texts: list[tuple[float, float, str, dict[str, Any]]] = []
        self._drawings: list[tuple[float, float, float, Image.Image]] = []
        self._depth = _GAP

    def skip(self, inches: float) -> None:
        """Leave room."""
        self._depth += inches

    def write(self, text: str, size: float, **style: Any) -> None:
        """Write over the whole width."""
        self._depth += self._text(_GAP, _WIDTH - 2 * _GAP, shorten(text, _MOST_LETTERS, placeholder=" …"), size, **style)

    def row(self, panels: Sequence[tuple[Sequence[str], Drawing]]) -> None:
        """Drawings beside each other, with their lines above and their captions below."""
        lefts = [_GAP + number * (self._panel + _GAP) for number in range(len(panels))]
        self._depth += 0.06
        above = [0.0] * len(panels)
        for number, (left, (lines, _)) in enumerate(zip(lefts, panels)):
            for line in lines:
                weight = "bold" if above[number] == 0 else "normal"
                above[number] += self._text(left, self._panel, line, 9, below=above[number], fontweight=weight)
        self._depth += max(above) + 0.03
        heights = [self._panel * drawing.image.height / drawing.image.width for _, drawing in panels]
        for left, height, (_, drawing) in zip(lefts, heights, panels):
            self._drawings.append((left, self._depth, height, drawing.image))
        self._depth += max(heights) + 0.03
        captions = [
            self._text(left, self._panel, drawing.caption, 9, color="#555555") for left, (_, drawing) in zip(lefts, panels)
        ]
        self._depth += max(captions) + 0.06

    def _text(self, left: float, width: float, text: str, size: float, below: float = 0.0, **style: Any) -> float:
        """Note down text that is broken into lines of a width; its height."""
        bold = 1.1 if style.get("fontweight") == "bold" else 1.0
        # A number keeps its sign of per cent.
        broken = fill(_plain(text.replace(" %", "\N{NO-BREAK SPACE}%")), max(int(width / (_LETTER * size * bold)), 12))
        self._texts.append((left, self._depth + below, broken, {"fontsize": size, **style}))
        return _ROW * size * (broken.count("\n") + 1)

    def figure(self) -> Figure:
        """All that was written and drawn."""
        height = self._depth + _GAP
        whole = Figure(figsize=(_WIDTH, height), dpi=200)
        for left, depth, text, style in self._texts:
            whole.text(left / _WIDTH, 1 - depth / height, text, va="top", linespacing=1.15, **style)
        for left, depth, tall, image in self._drawings:
            axes = whole.add_axes((left / _WIDTH, 1 - (depth + tall) / height, self._panel / _WIDTH, tall / height))
            axes.imshow(np.asarray(image), interpolation="antialiased", aspect="auto")
            axes.set_axis_off()
        return whole


def _plain(text: str) -> str:
    """Text in which no dollar sign begins a formula."""
    return text.replace("$", r"\$")


def png(drawn: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()
