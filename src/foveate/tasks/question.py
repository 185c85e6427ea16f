"""What is asked: a question has pictures, one or more turns, and answers that a metric compares with predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from PIL import Image

from foveate.tasks.metrics import metric


@dataclass(frozen=True, eq=False)
class Turn:
    """One prompt of a conversation and the answers that count as right, the one to show first.

    ``evidence``: bool ``[H, W]`` for each picture, the pixels that prove the answer (empty for "no" and "zero"); ``()``
    where nobody knows.
    """

    prompt: str
    answers: tuple[str, ...]
    evidence: Sequence[np.ndarray] = ()


@dataclass(frozen=True, eq=False)
class Question:
    """Pictures and the conversation about them; ``metric`` is a name in `foveate.tasks.metrics.METRICS`.

    ``max_new_tokens``: how long an answer may be; ``video``: whether the pictures are the frames of one.
    """

    task: str
    images: Sequence[Image.Image]
    turns: tuple[Turn, ...]
    metric: str = "exact"
    max_new_tokens: int = 16
    video: bool = False

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def prompt(self) -> str:
        """What is asked, turns below each other."""
        return "\n".join(turn.prompt for turn in self.turns)

    @property
    def answer(self) -> str:
        """The answer to show, turns below each other."""
        return "\n".join(turn.answers[0] for turn in self.turns)

    @property
    def evidence(self) -> tuple[np.ndarray, ...]:
        """For each picture the pixels that prove the answer to any turn; ``()`` where nobody knows."""
        known = [turn.evidence for turn in self.turns if turn.evidence]
        return tuple(np.logical_or.reduce(masks) for masks in zip(*known, strict=True))

    def score(self, predictions: Sequence[str]) -> float:
        """Score in 0..1 of one prediction for each turn: the mean over turns."""
        compare = metric(self.metric)
        return fmean(compare(said, turn.answers) for said, turn in zip(predictions, self.turns, strict=True))


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
