"""What became of a picture's tokens under one recipe, or under two side by side: as PNG and as a self-contained page."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from textwrap import fill

import jinja2
import numpy as np
from matplotlib.axes import Axes
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

_WIDTH = 3.0
"""Of a drawing, in inches."""
_MOST = 18.0
"""Of the whole."""


def figure(drawn: Sequence[Column], subject: Subject) -> Figure:
    """Both recipes below each other, stage by stage; what they rank by below the survivors."""
    shapes = [drawing.image.size for _, of_one in drawn for card in of_one for drawing in card.drawings]
    aspect = max(height / width for width, height in shapes)
    across = min(max(1.0, 1 / aspect), 1.9)
    fit = max(int(_MOST / (_WIDTH * across)), 1)
    rows = [
        (inspection if start == 0 else None, of_one[start : start + fit])
        for inspection, of_one in drawn
        for start in range(0, len(of_one), fit)
    ]
    columns = max(len(row) for _, row in rows)
    depths = [max(len(card.drawings) for card in row) for _, row in rows]
    heights = [0.7 + depth * (_WIDTH * across * aspect + 0.3) for depth in depths]
    width = max(columns * (_WIDTH * across + 0.15), 6.0)
    whole = Figure(figsize=(width, sum(heights) + 0.5), dpi=120, layout="constrained")
    whole.suptitle(fill(_plain(subject.prompt), int(8 * width)), fontsize=13, x=0.01, ha="left", fontweight="bold")
    if subject.evidence:
        whole.supxlabel("evidence: cyan is still there, red is lost", fontsize=8, x=0.01, ha="left", color="#666666")
    parts = whole.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (inspection, row), depth in zip(parts, rows, depths):
        if inspection is not None:
            said = f"{inspection.recipe}   →   {inspection.answer or '–'}"
            part.suptitle(fill(_plain(said), int(10 * width)), fontsize=11, x=0.01, ha="left", color="#0b5cad")
        axes = part.subplots(depth, columns, squeeze=False)
        for axis in axes.flat:
            axis.set_axis_off()
        for column, card in enumerate(row):
            _draw(axes[:, column], card)
    return whole


def _draw(axes: Sequence[Axes], card: Card) -> None:
    """One card, from top to bottom."""
    lines = [f"{card.title} · {card.method}" if card.method else card.title, card.tokens]
    if card.recall is not None:
        lines[-1] += f", evidence {card.recall:.0%}".replace("%", " %")
    axes[0].set_title("\n".join(lines), fontsize=9, loc="left")
    for axis, drawing in zip(axes, card.drawings):
        axis.imshow(np.asarray(drawing.image), interpolation="antialiased")
        axis.text(0, -0.03, drawing.caption, transform=axis.transAxes, fontsize=7.5, color="#666666", va="top")


def _plain(text: str) -> str:
    """Text in which no dollar sign begins a formula."""
    return text.replace("$", r"\$")


def png(drawn: Figure) -> bytes:
    """A figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png")
    return buffer.getvalue()
