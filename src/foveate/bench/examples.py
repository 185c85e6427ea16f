"""What the first questions of a cell looked like to the model: their pictures, and how far each visual token came."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from PIL import Image
from torch import Tensor

from foveate.tasks import Question, evidence_cells

EXAMPLES = 3
"""Questions of a cell that are kept with their pictures."""

_MOST_PICTURES = 8
_LONGEST_SIDE = 512


@dataclass(frozen=True)
class View:
    """One grid of visual tokens over a picture; models that cut tiles look at a picture in several.

    evidence: raster indices of the cells that hold the answer; None where nobody knows.
    depth: how many decoder layers the token of each cell enters, row by row; one text, as a list takes a line a number.
    """

    rows: int
    columns: int
    evidence: list[int] | None
    depth: str


@dataclass(frozen=True)
class Picture:
    """A picture as PNG in base64 (in a result folder: the name of its file), and the grids over it."""

    png: str
    views: list[View]


def illustrate(question: Question, grids: Sequence[tuple[int, int]], alive: Sequence[Sequence[Tensor]]) -> list[Picture]:
    """The first pictures of a question with what became of their tokens; nothing where grids do not belong to pictures.

    ``grids`` and, for each layer, ``alive`` (raster indices) as in `foveate.core.report.Trace`: the same number of grids
    for each picture, in order.
    """
    if not grids or len(grids) % len(question.images):
        return []
    views = len(grids) // len(question.images)
    evidence = question.evidence or (None,) * len(question.images)
    tokens = list(zip(*alive, strict=True))
    shown = [_view(evidence[place // views], grid, tokens[place]) for place, grid in enumerate(grids)]
    return [
        Picture(_png(image), shown[number * views : (number + 1) * views])
        for number, image in enumerate(question.images[:_MOST_PICTURES])
    ]


def _view(evidence: np.ndarray | None, grid: tuple[int, int], alive: Sequence[Tensor]) -> View:
    depth = np.zeros(grid[0] * grid[1], int)
    for tokens in alive:
        depth[tokens.cpu().numpy()] += 1
    known = None if evidence is None else np.flatnonzero(evidence_cells(evidence, *grid)).tolist()
    return View(*grid, known, " ".join(map(str, depth)))


def _png(image: Image.Image) -> str:
    small = image.convert("RGB")
    small.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    buffer = BytesIO()
    small.save(buffer, format="png", optimize=True)
    return b64encode(buffer.getvalue()).decode()
