"""Measures one cell: answers its questions under a recipe and reads off what that cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from statistics import fmean, median
from typing import Any

from PIL import Image
from torch import Tensor

from foveate.bench.cells import Cell
from foveate.bench.encodings import Encodings
from foveate.bench.examples import EXAMPLES, Picture, illustrate
from foveate.bench.folder import Settings
from foveate.bench.peak import Peak
from foveate.bench.questions import ask
from foveate.bench.records import RATIOS, Answer, Measurement
from foveate.checkpoint import Checkpoint, load, parse_model_args, resolve_device
from foveate.core.errors import FoveateError
from foveate.core.recipe import NONE, Recipe
from foveate.core.report import Report, Trace
from foveate.engine import Session, limit
from foveate.tasks import Question, evidence_cells

Questions = Sequence[Question]


@dataclass(frozen=True)
class _Batch:
    """One batch as it was answered, and, if it is timed, beside it what the same takes unmodified and at the physical limit.

    ``visual``: visual tokens entering each layer, in all. ``recalls``: evidence recall of each question entering each layer.
    ``examples``: pictures of the first questions.
    """

    answers: list[Answer]
    visual: list[int]
    recalls: list[list[float | None]]
    examples: list[list[Picture]]
    report: Report
    peak_bytes: int | None = None
    pairs: dict[str, float] | None = None


class Bench:
    """A model on which cells are measured."""

    def __init__(self, checkpoint: Checkpoint, settings: Settings, shown: Sequence[Image.Image] = ()) -> None:
        """``shown``: pictures that are asked about; a recipe that cannot change them as it wants is refused."""
        self._checkpoint = checkpoint
        self._shown = shown
        self._encodings = Encodings(checkpoint.model)
        self._settings = settings

    @classmethod
    def load(cls, settings: Settings, task: str) -> Bench:
        """The model of ``settings``; ``task`` is one of theirs."""
        device, arguments = resolve_device(settings.device), parse_model_args(settings.model_args)
        beside = (settings.companion, settings.artifacts, arguments, settings.system)
        loaded = load(settings.model, device, settings.dtype, *beside)
        if settings.data is not None:
            loaded.refuse_placeholders(turn.prompt for each in ask(settings, task) for turn in each.turns)
        return cls(loaded, settings, ask(replace(settings, n=1) if settings.data is None else settings, task)[0].images)

    def __call__(self, cell: Cell, questions: Questions, advance: Callable[[int], None]) -> Measurement:
        """Measure a cell on its questions."""
        return measure(self._checkpoint, self._encodings, self._settings, cell, questions, advance)

    def refusals(self, recipes: Sequence[Recipe]) -> list[str | None]:
        """Why the model does not take each of the recipes, by trying; None where it does."""
        return [self._refusal(recipe) for recipe in recipes]

    def _refusal(self, recipe: Recipe) -> str | None:
        try:
            with self._checkpoint.attach(recipe) as session:
                session.pictures(self._shown, self._checkpoint.processor)
        except FoveateError as error:
            return str(error)
        return None


def measure(
    checkpoint: Checkpoint,
    encodings: Encodings,
    settings: Settings,
    cell: Cell,
    questions: Questions,
    advance: Callable[[int], None],
) -> Measurement:
    """Answer ``questions`` under the cell's recipe; ``advance`` is told how many more are answered."""
    # A conversation goes on from its own answers, so each has a cache of its own.
    size = settings.batch_size if all(len(question.turns) == 1 for question in questions) else 1
    batches = [questions[start : start + size] for start in range(0, len(questions), size)]
    anew = encodings.about(cell.task)
    if anew:
        _warm_up(checkpoint, NONE, batches[0])
    _warm_up(checkpoint, cell.recipe, batches[0], films=settings.films)
    done: list[_Batch] = []
    for number, batch in enumerate(batches):
        # A session for each batch: comparisons are timed between them, and methods that draw do not stake all on one draw.
        seed = settings.seed * len(batches) + number
        shown = max(0, EXAMPLES - number * size)
        if number < settings.timed:
            done.append(_time(checkpoint, cell, batch, seed, shown, settings.films, unmodified_first=number % 2 == 1))
        else:
            done.append(_answer(checkpoint, cell.recipe, batch, seed, shown, encodings, films=settings.films))
        advance(len(batch))
    return _summarise(done)


def evidence_recalls(
    question: Question, grids: Sequence[tuple[int, int]], layers: Sequence[Sequence[Tensor]]
) -> list[float | None]:
    """Share of the question's evidence cells among the visual tokens that enter each of ``layers``; None without evidence.

    ``grids`` and what is alive in a layer (raster indices) as in `foveate.core.report.Trace`: one or more for each picture,
    in order.
    """
    if not question.evidence or len(grids) % len(question.images):
        return [None] * len(layers)
    views, evidence = len(grids) // len(question.images), question.evidence
    cells = [evidence_cells(evidence[number // views], *grid).ravel() for number, grid in enumerate(grids)]
    shown = sum(int(each.sum()) for each in cells)
    seen = [sum(int(each[kept.cpu().numpy()].sum()) for each, kept in zip(cells, alive, strict=True)) for alive in layers]
    return [each / shown if shown else None for each in seen]


def by_frame(
    frames: int, grids: Sequence[tuple[int, int]], layers: Sequence[Sequence[Tensor]]
) -> tuple[list[tuple[int, int]], list[list[Tensor]]]:
    """The one grid of a video of so many frames, and what is alive of it in each of ``layers``, frame by frame."""
    ((rows, columns),) = grids
    tokens = rows * columns // frames
    apart = [[whole[whole // tokens == frame] % tokens for frame in range(frames)] for (whole,) in layers]
    return [(rows // frames, columns)] * frames, apart


def _warm_up(checkpoint: Checkpoint, recipe: Recipe | str, batch: Questions, *, films: bool = False) -> None:
    """Answer a batch for nothing: the first of a shape pays for allocations and kernel choices."""
    with checkpoint.attach(recipe) as session, _filmed(session, batch, films):
        checkpoint.answer(_inputs(checkpoint, batch, session), max_new_tokens=2)


def _time(
    checkpoint: Checkpoint, cell: Cell, batch: Questions, seed: int, shown: int, films: bool, *, unmodified_first: bool
) -> _Batch:
    """Answer a batch under the recipe and unmodified, one right after the other, and the encoder runs for both.

    So both meet the machine in the same state. Who comes first alternates, or what wears off would always favour one.
    """
    unmodified = partial(_answer, checkpoint, NONE, batch)
    plain = unmodified().report if unmodified_first else None
    device_peaks = Peak(checkpoint.model)
    answered = _answer(checkpoint, cell.recipe, batch, seed, shown, films=films)
    peak = device_peaks.bytes()
    limit_seconds = limit.prefill_seconds(checkpoint.model, answered.report, repeats=1)
    report, plain = answered.report, plain or unmodified().report
    pairs = {
        "speedup": plain.prefill_seconds / report.prefill_seconds,
        "first_token_speedup": plain.first_token_seconds / report.first_token_seconds,
        "total_speedup": plain.total_seconds / report.total_seconds,
        "efficiency": limit_seconds / report.prefill_seconds,
    }
    return replace(answered, peak_bytes=peak, pairs=pairs)


def _answer(
    checkpoint: Checkpoint,
    recipe: Recipe | str,
    batch: Questions,
    seed: int = 0,
    shown: int = 0,
    encodings: Encodings | None = None,
    *,
    films: bool = False,
) -> _Batch:
    """Answer a batch; ``encodings`` may serve what the encoder made of the same pictures before."""
    longest = batch[0].max_new_tokens
    served = encodings.serve if encodings else nullcontext
    with checkpoint.attach(recipe, seed) as session, served(session), _filmed(session, batch, films):
        if len(batch[0].turns) == 1:
            predictions = [[said] for said in checkpoint.answer(_inputs(checkpoint, batch, session), longest)]
            report, trace = session.report, session.trace
        else:
            (question,) = batch
            costs = list[tuple[Report, Trace]]()
            prompts = [turn.prompt for turn in question.turns]
            predictions = [
                checkpoint.converse(
                    question.images, prompts, longest, session, lambda: costs.append((session.report, session.trace))
                )
            ]
            report, trace = costs[0]  # the turn that brings the pictures
    # Of text alone there is nothing to trace.
    nothing: list[list[Any]] = [[] for _ in batch]
    seen, alive = trace.grids or nothing, [trace.alive(layer) or nothing for layer in range(checkpoint.layers)]
    traced = [(grids, [layer[b] for layer in alive]) for b, grids in enumerate(seen)]
    if films:
        traced = [by_frame(len(q.images), *each) if q.video else each for q, each in zip(batch, traced)]
    recalls = [evidence_recalls(q, grids, layers) for q, (grids, layers) in zip(batch, traced)]
    return _Batch(
        answers=[
            Answer(q.prompt, q.answer, "\n".join(said), q.score(said), recall[-1])
            for q, said, recall in zip(batch, predictions, recalls, strict=True)
        ],
        visual=[sum(len(tokens) for items in layer for tokens in items) for layer in alive],
        recalls=recalls,
        examples=[illustrate(q, grids, layers) for q, (grids, layers) in zip(batch[:shown], traced)],
        report=report,
    )


def _filmed(session: Session, batch: Questions, films: bool) -> AbstractContextManager[None]:
    """Where ``films`` are wanted, the frames of each question about a video as one."""
    if not films or not any(question.video for question in batch):
        return nullcontext()
    counts = [[len(question.images)] if question.video else [1] * len(question.images) for question in batch]
    return session.films([*chain.from_iterable(counts)])


def _inputs(checkpoint: Checkpoint, batch: Questions, session: Session) -> dict[str, Tensor]:
    prompts = [question.turns[0].prompt for question in batch]
    return checkpoint.inputs([question.images for question in batch], prompts, session)


def _summarise(batches: Sequence[_Batch]) -> Measurement:
    # A last batch that is smaller takes less time.
    full = [batch for batch in batches if len(batch.answers) == len(batches[0].answers)]
    timed = [batch for batch in full if batch.pairs is not None]
    decode = [batch.report.decode_seconds / steps for batch in full if (steps := batch.report.decode_steps)]
    peaks = [batch.peak_bytes for batch in timed if batch.peak_bytes is not None]
    answers = [answer for batch in batches for answer in batch.answers]
    visual = [sum(layer) / len(answers) for layer in zip(*(batch.visual for batch in batches), strict=True)]
    cached = [sum(layer) / len(answers) for layer in zip(*(batch.report.kv_bytes for batch in batches), strict=True)]
    return Measurement(
        answers=answers,
        visual_tokens=visual[-1],
        prefill_seconds=median(batch.report.prefill_seconds for batch in full),
        decode_seconds=median(decode) if decode else None,
        first_token_seconds=median(batch.report.first_token_seconds for batch in timed),
        total_seconds=median(batch.report.total_seconds for batch in timed),
        peak_bytes=max(peaks) if peaks else None,
        kv_bytes=sum(cached),
        batch=len(batches[0].answers),
        pairs={name: [batch.pairs[name] for batch in timed if batch.pairs is not None] for name in RATIOS},
        visual_by_layer=visual,
        kv_by_layer=cached,
        evidence_by_layer=[_mean(layer) for layer in zip(*(recall for batch in batches for recall in batch.recalls))],
        examples=[pictures for batch in batches for pictures in batch.examples],
    )


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None
