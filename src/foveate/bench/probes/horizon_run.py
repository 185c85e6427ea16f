"""Runs the information-horizon probe and draws up its charts and hints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from statistics import fmean

from foveate.bench.probes.charts import Chart, Series
from foveate.bench.probes.hints import Hints
from foveate.bench.probes.horizon import TOLERANCE, WINDOW, Information, Leave, first_below, question_information
from foveate.bench.probes.kept import Kept
from foveate.bench.probes.scores import scores
from foveate.checkpoint import Checkpoint
from foveate.core.recipe import Recipe
from foveate.core.statistics import wilson
from foveate.tasks import Question

PROBE = "information-horizon"
HINTS = ("horizon", "horizon_by_task", "information_horizon")
"""What it tells the tuner, by the names in `Hints`."""
MEAN = "mean over tasks"

Asked = Mapping[str, Sequence[Question]]
"""Questions by task."""


@dataclass(frozen=True)
class HorizonOptions:
    """How to look.

    Attributes:
        batch_size: questions (or windows of one question) at once.
        windows: questions of each task whose windows are looked at one by one.
        window: side of a window in tokens.
        leave_one_out: whether information is what is lost without the window, not what it adds to none.
        tolerance: share of the score, and probability, below which nothing is said to be lost.
    """

    batch_size: int = 25
    windows: int = 4
    window: int = WINDOW
    leave_one_out: bool = False
    tolerance: float = TOLERANCE


def probe_horizon(
    checkpoint: Checkpoint, asked: Asked, options: HorizonOptions, kept: Kept, advance: Callable[[], None]
) -> tuple[list[Chart], Hints]:
    """Measure what ``kept`` does not hold; ``advance`` is called for each of `horizon_steps`."""
    exits: dict[str, list[list[float]]] = {task: [] for task in asked}
    found: dict[str, list[Information]] = {task: [] for task in asked}
    for task, questions in asked.items():
        for layer in range(checkpoint.layers + 1):
            name = f"{task}: exit before layer {layer}"
            exits[task].append(kept.get(name, _exit_scores, checkpoint, questions, layer, options))
            advance()
        for number, question in enumerate(questions[: options.windows]):
            name = f"{task}: windows of question {number}"
            found[task].append(Information(**kept.get(name, _information, checkpoint, question, options)))
            advance()
    hints = _hints(exits, found, options.tolerance)
    return [_exit_chart(exits, hints, options), *_information_charts(found, hints, options)], hints


def horizon_steps(asked: Asked, options: HorizonOptions, depth: int) -> int:
    """How often `probe_horizon` advances."""
    return sum(depth + 1 + min(options.windows, len(questions)) for questions in asked.values())


def _exit_scores(checkpoint: Checkpoint, questions: Sequence[Question], layer: int, options: HorizonOptions) -> list[float]:
    recipe = Leave(layer) if layer < checkpoint.layers else Recipe()
    return scores(checkpoint, recipe, questions, options.batch_size).values


def _information(checkpoint: Checkpoint, question: Question, options: HorizonOptions) -> dict[str, list[float]]:
    return asdict(
        question_information(checkpoint, question, options.batch_size, options.window, leave_one_out=options.leave_one_out)
    )


def _hints(exits: Mapping[str, list[list[float]]], found: Mapping[str, list[Information]], tolerance: float) -> Hints:
    lost = {task: drops for task, by_layer in exits.items() if (drops := _drops(by_layer))}
    largest = [information.largest for questions in found.values() for information in questions]
    return Hints(
        horizon=first_below(_mean_of(list(lost.values())), tolerance) if lost else None,
        horizon_by_task={task: first_below(lost[task], tolerance) if task in lost else None for task in exits},
        information_horizon=first_below(_mean_of(largest), tolerance) if largest else None,
    )


def _drops(by_layer: Sequence[Sequence[float]]) -> list[float]:
    """Share of the unmodified model's score (the last entry) that is lost by leaving before each layer; none if it is 0."""
    base = fmean(by_layer[-1])
    return [1 - fmean(scores) / base for scores in by_layer[:-1]] if base else []


def _mean_of(curves: Sequence[Sequence[float]]) -> list[float]:
    return [fmean(values) for values in zip(*curves, strict=True)]


def _exit_chart(exits: Mapping[str, list[list[float]]], hints: Hints, options: HorizonOptions) -> Chart:
    pooled = [list(chain(*of_tasks)) for of_tasks in zip(*exits.values(), strict=True)]
    curves = {MEAN: pooled, **exits} if len(exits) > 1 else exits
    where = "no layer" if hints.horizon is None else f"layer {hints.horizon}"
    return Chart(
        title="Score when all visual tokens leave before a layer",
        caption=f"The rightmost point is the unmodified model; bands are 95 % intervals. Less than "
        f"{100 * options.tolerance:g} % of the score is lost, mean over tasks, from {where} on ({_by_task(hints)}).",
        x_label="first decoder layer without visual tokens",
        y_label="score",
        series=tuple(_score_series(name, by_layer) for name, by_layer in curves.items()),
    )


def _by_task(hints: Hints) -> str:
    return ", ".join(f"{task}: {'none' if layer is None else layer}" for task, layer in hints.horizon_by_task.items())


def _score_series(name: str, by_layer: Sequence[Sequence[float]]) -> Series:
    ends = [wilson(sum(values), len(values)) for values in by_layer]
    low, high = zip(*ends, strict=True)
    return Series(name, tuple(range(len(by_layer))), tuple(map(fmean, by_layer)), low, high)


def _information_charts(found: Mapping[str, list[Information]], hints: Hints, options: HorizonOptions) -> list[Chart]:
    if not any(found.values()):
        return []
    side, count = options.window, max(map(len, found.values()))
    change = "is lost when one window leaves" if options.leave_one_out else "is gained when one window stays instead of none"
    where = "no layer" if hints.information_horizon is None else f"layer {hints.information_horizon}"
    largest = _information_series(found, lambda information: information.largest)
    average = _information_series(found, lambda information: information.mean)[0]
    return [
        Chart(
            title="Information of the most telling window",
            caption=f"Probability of the right answer's first token that {change}, windows of {side} x {side} tokens: the "
            f"largest of each picture, and for comparison the average one; {count} question{'s' * (count > 1)} a task. "
            f"The largest stays below {options.tolerance:g}, mean over tasks, from {where} on.",
            x_label=f"first decoder layer without {'it' if options.leave_one_out else 'the others'}",
            y_label="change of probability",
            series=(*largest, replace(average, name=f"average window, {average.name}")),
        ),
        Chart(
            title="Information of the whole picture",
            caption="Probability of the right answer's first token with all visual tokens, less that without any from a "
            f"layer on; {count} question{'s' * (count > 1)} a task.",
            x_label="first decoder layer without visual tokens",
            y_label="change of probability",
            series=_information_series(found, lambda information: information.whole),
        ),
    ]


def _information_series(
    found: Mapping[str, list[Information]], curve: Callable[[Information], Sequence[float]]
) -> tuple[Series, ...]:
    """The mean over tasks first, where there are several."""
    curves = {task: _mean_of(list(map(curve, questions))) for task, questions in found.items()}
    if len(curves) > 1:
        curves = {MEAN: _mean_of(list(curves.values())), **curves}
    return tuple(Series(name, tuple(range(len(values))), tuple(values)) for name, values in curves.items())
