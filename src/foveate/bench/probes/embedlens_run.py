"""Runs the EmbedLens probe and draws up its charts and hints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from statistics import fmean
from typing import Any

from foveate.bench.probes.charts import Chart, Series
from foveate.bench.probes.embedlens import KINDS, Lens, Makeup, Without, count_words, makeup
from foveate.bench.probes.hints import Hints
from foveate.bench.probes.kept import Kept
from foveate.bench.probes.scores import scores
from foveate.checkpoint import Checkpoint
from foveate.core.recipe import Recipe
from foveate.core.statistics import wilson
from foveate.ops.vocabulary import Word
from foveate.tasks import Question

PROBE = "embedlens"
HINTS = ("sink_share", "dead_share")
"""What it tells the tuner, by the names in `Hints`."""
RANKS = 30
"""Words in the chart."""
NAMED = 6
"""Words of a kind in its caption."""

Asked = Mapping[str, Sequence[Question]]
"""Questions by task."""


@dataclass(frozen=True)
class LensOptions:
    """How to look.

    Attributes:
        batch_size: questions at once.
        top_k: a token is of a kind if any of so many nearest words is that kind's.
        seed: of the tokens that are drawn to go instead.
    """

    batch_size: int
    top_k: int
    seed: int = 0


@dataclass(frozen=True)
class Removal:
    """Tokens that go before the language model, in one run over all questions of a task."""

    name: str
    kinds: tuple[str, ...] = ()
    others: bool = False


REMOVALS = (
    Removal("unmodified"),
    Removal("sinks", ("sink",)),
    Removal("dead", ("dead",)),
    Removal("sinks and dead", ("sink", "dead")),
    Removal("as many as sinks", ("sink",), others=True),
    Removal("as many as dead", ("dead",), others=True),
    Removal("as many as sinks and dead", ("sink", "dead"), others=True),
)


def probe_embedlens(
    checkpoint: Checkpoint,
    pictures: Sequence[Question],
    asked: Asked,
    options: LensOptions,
    kept: Kept,
    advance: Callable[[], None],
) -> tuple[list[Chart], Hints]:
    """Find the kinds on ``pictures``, then see what their removal costs on ``asked``; `lens_steps` in all."""
    words = [Word(**word) for word in kept.get("words", _words, checkpoint, pictures, options)]
    advance()
    lens = Lens.of(words, options.top_k)
    made = Makeup(**kept.get("makeup", _makeup, checkpoint, pictures, lens, options))
    advance()
    removed: dict[str, list[dict[str, Any]]] = {}
    for removal in REMOVALS:
        for task, questions in asked.items():
            recipe = _recipe(removal, lens)
            if recipe is not None:
                name = f"{task}: {removal.name}"
                found = kept.get(name, _removed, checkpoint, recipe, questions, options)
                removed.setdefault(removal.name, []).append(found)
            advance()
    hints = Hints(sink_share=made.shares["sink"], dead_share=made.shares["dead"])
    return [_word_chart(checkpoint, words, made), _depth_chart(made), _removal_chart(removed)], hints


def lens_steps(asked: Asked) -> int:
    """How often `probe_embedlens` advances."""
    return 2 + len(REMOVALS) * len(asked)


def _words(checkpoint: Checkpoint, pictures: Sequence[Question], options: LensOptions) -> list[dict[str, Any]]:
    return [asdict(word) for word in count_words(checkpoint, pictures, options.batch_size).words]


def _makeup(checkpoint: Checkpoint, pictures: Sequence[Question], lens: Lens, options: LensOptions) -> dict[str, Any]:
    return asdict(makeup(checkpoint, pictures, lens, options.batch_size))


def _removed(
    checkpoint: Checkpoint, recipe: Recipe | Without, questions: Sequence[Question], options: LensOptions
) -> dict[str, Any]:
    return asdict(scores(checkpoint, recipe, questions, options.batch_size, options.seed))


def _recipe(removal: Removal, lens: Lens) -> Recipe | Without | None:
    """None where there is nothing of these kinds, or nothing that a simpler removal would not show."""
    ids = {"sink": lens.sinks, "dead": lens.dead}
    if not removal.kinds:
        return Recipe()
    if not all(ids[kind] for kind in removal.kinds):
        return None
    return Without(sum((ids[kind] for kind in removal.kinds), ()), lens.top_k, removal.others)


def _word_chart(checkpoint: Checkpoint, words: Sequence[Word], made: Makeup) -> Chart:
    ranked = list(enumerate(words[:RANKS], start=1))
    curves = {kind: [(rank, word.share) for rank, word in ranked if word.kind == kind] for kind in KINDS}
    shares = ", ".join(f"{made.shares[kind]:.0%} {kind}" for kind in KINDS)
    named = "; ".join(f"{kind}: {_named(checkpoint, words, kind)}" for kind in KINDS)
    return Chart(
        title="Words at which visual tokens lie",
        caption=f"The nearest input embedding of each projected visual token, most frequent words first. Tokens are "
        f"{shares}. Words of each kind: {named}.",
        x_label="rank of the word",
        y_label="share of the visual tokens",
        series=tuple(Series(kind, *zip(*points)) for kind, points in curves.items() if points),
    )


def _named(checkpoint: Checkpoint, words: Sequence[Word], kind: str) -> str:
    of_kind = (checkpoint.processor.tokenizer.decode([word.id]).strip() for word in words if word.kind == kind)
    first = list(islice(of_kind, NAMED + 1))
    return ", ".join(map(repr, first[:NAMED])) + (", ..." if len(first) > NAMED else "") if first else "none"


def _depth_chart(made: Makeup) -> Chart:
    curves = {kind: cosines for kind, cosines in made.cosines.items() if cosines is not None}
    return Chart(
        title="How much each kind changes over the depth",
        caption="Cosine of visual tokens entering a decoder layer to what they were when they entered the first.",
        x_label="decoder layer",
        y_label="cosine to the projected token",
        series=tuple(Series(kind, tuple(range(len(cosines))), tuple(cosines)) for kind, cosines in curves.items()),
    )


def _removal_chart(removed: Mapping[str, Sequence[Mapping[str, Any]]]) -> Chart:
    lines = {"sinks, dead tokens, both": False, "as many others": True}
    return Chart(
        title="What it costs to do without them",
        caption="Score over all tasks when sinks, dead tokens or both go before the language model, and when as many "
        "others, drawn at random, go instead (all of them where there are fewer); bands are 95 % intervals.",
        x_label="share of the visual tokens removed",
        y_label="score, mean over tasks",
        series=tuple(_removal_series(name, removed, others) for name, others in lines.items()),
    )


def _removal_series(name: str, removed: Mapping[str, Sequence[Mapping[str, Any]]], others: bool) -> Series:
    points = []
    for removal in REMOVALS:
        if removal.name in removed and (removal.others == others or not removal.kinds):
            by_task = removed[removal.name]
            values = [value for task in by_task for value in task["values"]]
            gone = 1 - fmean(task["kept"] for task in by_task)
            points.append((gone, fmean(values), *wilson(sum(values), len(values))))
    x, y, low, high = zip(*sorted(points))
    return Series(name, x, y, low, high)
