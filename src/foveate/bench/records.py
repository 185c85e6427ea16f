"""What the bench writes: one flat record per finished cell, and what a cell that failed leaves behind."""

from __future__ import annotations

import traceback
from dataclasses import dataclass, field
from typing import Any

from foveate.bench.cells import Cell, Keep, Key, keep_text
from foveate.bench.examples import Picture
from foveate.core.errors import FoveateError


@dataclass(frozen=True)
class Record:
    """One row of ``results.json``: a method at a budget on a task. ``None`` where a number is undefined.

    score, score_low, score_high: mean score and its 95 % interval, Wilson's where every question scores 0 or 1 and the
        bootstrap's otherwise.
    retention: score over the unmodified model's on the same questions.
    evidence_recall: share of the evidence cells that are alive entering the last decoder layer, mean over the questions
        that have evidence.
    visual_tokens: visual tokens of a question alive entering the last decoder layer, mean.
    prefill_seconds: the language model's prefill of one batch (encoder not included), median over full batches.
    decode_seconds: one decoding step of one batch, median over full batches.
    efficiency: seconds of the plain layers on exactly the live rows over ``prefill_seconds``, median; 1.0 is the limit.
    kv_bytes: the cache of one question when its answer is finished, mean.
    batch: questions that were answered at once; all seconds are of so many. Of a conversation they are its last turn's.
    first_token_seconds: from entering ``generate`` to the logits of the first token, encoder and methods included, median
        over the timed batches, in which the encoder really runs.
    total_seconds: from entering ``generate`` to the end of the longest answer, median over the timed batches.
    peak_bytes: the most memory that was allocated on the GPUs of the model while a timed batch was answered, weights
        included; None on a CPU, where nobody counts it.
    speedup, first_token_speedup, total_speedup: seconds of the unmodified model over those of the method, of prefill, to the
        first token and in all: the median over pairs, a timed batch under both, one right after the other. ``_low`` and
        ``_high`` are the ends of its 95 % interval (paired bootstrap, `foveate.bench.statistics.ratio`; those of
        ``efficiency`` likewise), None where one batch was timed.
    """

    model: str
    task: str
    method: str
    keep: Keep
    n: int
    seed: int
    score: float
    score_low: float
    score_high: float
    retention: float | None
    evidence_recall: float | None
    visual_tokens: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    efficiency: float | None
    kv_bytes: float | None
    batch: int | None = None
    first_token_seconds: float | None = None
    total_seconds: float | None = None
    peak_bytes: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    first_token_speedup: float | None = None
    first_token_speedup_low: float | None = None
    first_token_speedup_high: float | None = None
    total_speedup: float | None = None
    total_speedup_low: float | None = None
    total_speedup_high: float | None = None
    efficiency_low: float | None = None
    efficiency_high: float | None = None

    @property
    def decode_rate(self) -> float | None:
        """Tokens that decoding makes in a second, for all questions of a batch together."""
        return self.batch / self.decode_seconds if self.batch and self.decode_seconds else None

    @property
    def key(self) -> Key:
        """The key of its cell."""
        return self.task, self.method, keep_text(self.keep)


SPEEDUPS = ("speedup", "first_token_speedup", "total_speedup")
RATIOS = (*SPEEDUPS, "efficiency")
"""Names of the ratios in a record."""


@dataclass(frozen=True)
class Answer:
    """One question as a cell answered it."""

    prompt: str
    answer: str
    prediction: str
    score: float
    evidence_recall: float | None


@dataclass(frozen=True)
class Measurement:
    """The answers of a cell and its cost; the units are those of ``Record``.

    pairs: for each of `RATIOS`, one ratio for each timed batch, whose two sides were timed one right after the other
        (seconds of different cells lie minutes apart, in which a shared machine changes).
    visual_by_layer, kv_by_layer, evidence_by_layer: the same means entering (of the cache: in) each decoder layer.
    examples: the pictures of the first questions, with what became of their tokens.
    """

    answers: list[Answer]
    visual_tokens: float
    prefill_seconds: float
    decode_seconds: float | None
    first_token_seconds: float
    total_seconds: float
    peak_bytes: float | None
    kv_bytes: float
    batch: int
    pairs: dict[str, list[float]]
    visual_by_layer: list[float]
    kv_by_layer: list[float]
    evidence_by_layer: list[float | None]
    examples: list[list[Picture]] = field(default_factory=list)


@dataclass(frozen=True)
class Failure:
    """A cell that raised: the error in one line, and where it came from."""

    cell: Cell
    error: str
    traceback: str

    @classmethod
    def of(cls, cell: Cell, error: BaseException) -> Failure:
        """What a cell died of."""
        message = " ".join(str(error).split())
        # What a user got wrong says so itself; of other errors the kind is half of the message.
        line = message if isinstance(error, FoveateError) else f"{type(error).__name__}: {message}".removesuffix(": ")
        return cls(cell, line, "".join(traceback.format_exception(error)))

    def to_json(self) -> dict[str, Any]:
        """The failure as ``failures.json`` holds it."""
        named = {"task": self.cell.task, "method": self.cell.method, "keep": self.cell.keep}
        return {**named, "error": self.error, "traceback": self.traceback}
