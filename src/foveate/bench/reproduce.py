"""A claim beside what is measured: the benchmark without and with the recipe, on the model that the claim is about."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from foveate.bench.cells import Cell
from foveate.bench.claims import Claim
from foveate.bench.encodings import Encodings
from foveate.bench.folder import Settings, claim, provenance
from foveate.bench.measure import measure
from foveate.bench.questions import ask
from foveate.bench.statistics import Ratio, retained
from foveate.checkpoint import load
from foveate.core.errors import FoveateError
from foveate.core.files import write_json
from foveate.core.recipe import NONE, Recipe


@dataclass(frozen=True)
class Ran:
    """A benchmark under a recipe: the score of each question, and means over them.

    visual_tokens: entering a decoder layer, mean over layers. prefill_seconds: of a question.
    """

    scores: list[float]
    visual_tokens: float
    prefill_seconds: float


class Runner(Protocol):
    """Runs benchmarks on a model."""

    def __call__(self, model: str, recipe: str, benchmark: str, limit: int | None) -> Ran:
        """The first ``limit`` questions of a benchmark (all, if None) under a recipe."""


@dataclass(frozen=True)
class Setup:
    """How the model is loaded and asked: device and dtype as they are resolved, and what `load` takes besides."""

    device: str
    dtype: str
    batch_size: int
    companion: str | None = None
    artifacts: str | None = None


@dataclass(frozen=True)
class Reproduction:
    """What was measured beside a claim.

    kept: the score kept, in percent, mean over the benchmarks, with its 95 % interval (paired bootstrap over questions).
    tokens, of: visual tokens with and without the recipe, mean over layers and questions.
    prefill_speedup: of the language model's prefill; seconds of runs one after the other, so no more than a hint.
    """

    claim: Claim
    n: int
    kept: float
    low: float
    high: float
    tokens: float
    of: float
    prefill_speedup: float

    @property
    def verdict(self) -> str:
        """Whether the claim's score lies in the interval."""
        said = self.claim.kept_percent
        if said is None:
            return "claims no score"
        if self.low <= said <= self.high:
            return "as claimed"
        return "less is kept than claimed" if self.high < said else "more is kept than claimed"


def reproduce(
    wanted: Claim,
    run: Runner,
    out: Path,
    setup: Setup,
    limit: int | None = None,
    *,
    resume: bool = False,
    told: Callable[[str], None] = lambda line: None,
) -> Reproduction:
    """Run what is missing in the folder ``out``, keep each run as soon as it is done, and compare.

    Raises:
        FoveateError: before any run, if the claim names no benchmark or the folder holds another claim's runs.
    """
    if not wanted.benchmarks:
        raise FoveateError("tasks: the source of this claim does not name its benchmarks; name some with --tasks pope,gqa")
    recipe = str(Recipe.parse(wanted.recipe))
    settings = {"claim": _plain(wanted), "limit": limit, **asdict(setup)}
    lock = claim(out, settings, "reproduction", resume=resume)
    write_json(out / "settings.json", {**settings, **provenance()})
    pairs = []
    for benchmark in wanted.benchmarks:
        pairs.append([_kept(out, run, wanted.model, each, benchmark, limit, told) for each in (NONE, recipe)])
    found = compared(wanted, pairs)
    write_json(out / "reproduction.json", {**_plain(found), "verdict": found.verdict})
    lock.release()
    return found


def compared(wanted: Claim, pairs: Sequence[Sequence[Ran]]) -> Reproduction:
    """The claim beside runs of each benchmark without and with the recipe."""
    plain, ran = zip(*pairs, strict=True)
    score: Ratio = retained([(one.scores, base.scores) for base, one in pairs])
    assert score.low is not None
    assert score.high is not None
    return Reproduction(
        claim=wanted,
        n=sum(len(each.scores) for each in ran),
        kept=100 * score.value,
        low=100 * score.low,
        high=100 * score.high,
        tokens=fmean(each.visual_tokens for each in ran),
        of=fmean(each.visual_tokens for each in plain),
        prefill_speedup=sum(each.prefill_seconds for each in plain) / sum(each.prefill_seconds for each in ran),
    )


class Generated:
    """Runs generated tasks, for claims about a reference model; their names take the benchmarks' place."""

    def __init__(self, setup: Setup, default_limit: int = 100) -> None:
        self._setup = setup
        self._limit = default_limit

    def __call__(self, model: str, recipe: str, benchmark: str, limit: int | None) -> Ran:
        """As `Runner`."""
        setup = self._setup
        size = (limit or self._limit, 0, setup.device, setup.dtype, setup.batch_size)
        settings = Settings(model, *size, setup.companion, timed=1, artifacts=setup.artifacts)
        loaded = load(model, setup.device, setup.dtype, setup.companion, setup.artifacts)
        cell = Cell(benchmark, recipe, None, Recipe.parse(recipe))
        questions = ask(settings, benchmark)
        done = measure(loaded, Encodings(loaded.model), settings, cell, questions, lambda answered: None)
        seconds = done.prefill_seconds / done.batch
        return Ran([answer.score for answer in done.answers], fmean(done.visual_by_layer), seconds)


class Lmms:
    """Runs benchmarks of lmms-eval with the model ``foveate`` (`foveate.bench.lmms`)."""

    def __init__(self, setup: Setup) -> None:
        try:
            from lmms_eval.evaluator import simple_evaluate
        except ImportError as error:
            raise FoveateError("lmms-eval: is not installed; pip install 'foveate[lmms]'") from error
        self._evaluate = simple_evaluate
        self._setup = setup

    def __call__(self, model: str, recipe: str, benchmark: str, limit: int | None) -> Ran:
        """As `Runner`."""
        given = {"pretrained": model, "recipe": recipe, **asdict(self._setup)}
        size = given.pop("batch_size")
        arguments = ",".join(f"{name}={value}" for name, value in given.items() if value is not None)
        found = self._evaluate(
            "foveate", arguments, tasks=[benchmark], batch_size=size, limit=limit, log_samples=True, verbosity="ERROR"
        )
        cost = found["throughput"]
        return Ran(question_scores(benchmark, found), cost["avg_visual_tokens"], cost["avg_prefill_seconds"])


def question_scores(benchmark: str, found: Mapping[str, Any]) -> list[float]:
    """The score of each question of a benchmark, task by task, from what lmms-eval gives back.

    The first metric counts that has a number, or a mapping with a number as its ``score``, for every question.

    Raises:
        FoveateError: if there is none, as where answers are judged together.
    """
    scores: list[float] = []
    for task, samples in sorted(found["samples"].items()):
        metrics = dict.fromkeys(name.partition(",")[0] for name in found["results"][task] if "_stderr" not in name)
        asked = sorted(samples, key=lambda sample: sample["doc_id"])
        known = ([_number(sample.get(metric)) for sample in asked] for metric in metrics)
        each = next((values for values in known if values and None not in values), None)
        if each is None:
            raise FoveateError(f"tasks={benchmark!r}: lmms-eval gives no score of each question of {task}; leave it out")
        scores += [value for value in each if value is not None]
    return scores


def _number(value: Any) -> float | None:
    value = value.get("score") if isinstance(value, Mapping) else value
    return float(value) if isinstance(value, bool | int | float) else None


def _kept(
    out: Path, run: Runner, model: str, recipe: str, benchmark: str, limit: int | None, told: Callable[[str], None]
) -> Ran:
    """A run that the folder holds, or that is made now and kept."""
    path = out / f"{benchmark}.{'none' if recipe == NONE else 'recipe'}.json"
    if not path.is_file():
        told(f"{benchmark} · {recipe}")
        write_json(path, asdict(run(model, recipe, benchmark, limit)))
    return Ran(**json.loads(path.read_text(encoding="utf-8")))


def _plain(value: Claim | Reproduction) -> dict[str, Any]:
    """As JSON gives it back."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(value)))
    return found
