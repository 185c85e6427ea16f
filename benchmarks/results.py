"""Every registered method on the reference models, and the pages about it.

python -m benchmarks.results                 # measures what is missing in runs/results, then writes docs/results.md
python -m benchmarks.results --models ""     # only writes the pages, from the numbers in docs/results/*.jsonl

Three budgets and 300 questions a task take many hours on a CPU. Methods that came later stand in a series of their own, at
one budget and with 100 questions a task, under an hour on one core for thirty methods on both models:

python -m benchmarks.results --series later  # those that the first series has no rows of
python -m benchmarks.results --series cache  # methods on the cache at two smaller budgets, on long answers, turns and videos
python -m benchmarks.results --series verdict  # methods between the layers and on the cache, on reference-smol; then
python -m benchmarks.verdict                   # compares

Stop it whenever you like: the same command goes on. --workers 2 measures two cells at a time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import typer
from benchmarks.results_page import Cell, Numbers, Row, Task, read, write, write_pages

from foveate import checkpoint
from foveate.bench.cells import REFERENCE_POINTS, keep_text
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.statistics import beats
from foveate.bench.summary import Mean, means
from foveate.checkpoint import reference_smol
from foveate.cli.bench import CELLS_FAILED, BenchRequest, bench
from foveate.cli.ray_option import THIS_MACHINE
from foveate.core import registry
from foveate.core.errors import FoveateError
from foveate.core.recipe import Recipe
from foveate.core.weights import Weights
from foveate.engine.check import check
from foveate.engine.hosting import Verdict, verdicts
from foveate.models import anatomy


@dataclass(frozen=True)
class Series:
    """Rows that were measured on the same questions.

    Attributes:
        name: empty for the first; ``title``: what its section is called.
        keeps: its budgets.
        n: questions a task.
        tasks: which ones; None = those that a model has learnt, of the first series all.
        groups: of its methods; empty: all that the first series has no rows of.
        models: it is measured on.
        dtype: as large models are run, by default; on a CPU it is twice as fast on tiny ones, too.
        settings: which of the three of methods that have no `keep`, ample ones first.
        batch_size: questions at once; one batch of each cell is timed.
    """

    name: str
    keeps: str
    n: int
    title: str = ""
    tasks: str | None = None
    groups: tuple[str, ...] = ()
    models: tuple[str, ...] = ("reference-qwen", "reference-tiles")
    dtype: str = "bfloat16"
    settings: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 25

    def stem(self, model: str) -> str:
        """What files about a model are called."""
        return f"{model}-{self.name}" if self.name else model

    def path(self, model: str) -> Path:
        """The file of a model's numbers."""
        return PAGES / f"{self.stem(model)}.jsonl"


RECIPES = {
    # Prompts of a dozen words have no window of 32.
    "snapkv": "snapkv(window=8)",
    "mixkv": "mixkv(window=8)",
    # Of which 128 entries would stay as they are.
    "kivi": "kivi(residual=32)",
    # Whose own budgets, for kvpress' are the same in every layer where the last one would hold less than the window.
    "pyramidkv": "pyramidkv(window=8, reading='original')",
    # Nobody knows the depth of these pictures.
    "merge3d": "merge3d(geometry='none')",
    # In CLIP's space the published sign misleads on the reference tower; docs/architecture.md says more.
    "cdpruner": "cdpruner(relevance='embedding')",
}
"""How methods are run whose defaults do not suit these models."""
BUDGETS = {
    "index_preserving": ("threshold=-2.0", "threshold=0.0", "threshold=2.0"),
    "feather": ("kappa=0.5", "kappa=0.3", "kappa=0.15"),
    "hidrop": ("preset='tok80'", "preset='tok64'", "preset='tok48'"),
    # The former under M-RoPE, the latter elsewhere, where anchors and seeds come on top.
    "ivc_prune": ("target=0.33, context=0.23", "target=0.22, context=0.12", "target=0.11, context=0.01"),
    "shortv": ("frozen=0.4", "frozen=0.6", "frozen=0.8"),
    "transprune": ("ratios=(0.9, 0.75, 0.5)", "ratios=(0.875, 0.625, 0.125)", "ratios=(0.5, 0.25, 0.0)"),
    "v2drop": ("ratios=(0.75, 0.5, 0.25)", "ratios=(0.5, 0.5, 0.0)", "ratios=(0.25, 0.25, 0.0)"),
}
"""Three budgets, ample ones first, of methods that have no `keep`."""
INSTEAD = {"scope": "scope(saliency='received')"}
"""How methods are run where their defaults are refused."""

_MOST = 0.8
"""Share of its cells that a task must have to be on the pages; what is missing of it is a dash there."""

ROOT = Path(__file__).parent.parent
PAGES = ROOT / "docs" / "results"
SERIES = {
    "first": Series("", "0.33,0.22,0.11", 300),
    "later": Series("later", "0.22", 100, "methods that came later"),
    "cache": Series(
        "cache", "0.2,0.1", 100, "the cache at small budgets", "caption,compare,dialogue,stream,events", ("kv_cache",)
    ),
    "verdict": Series(
        "verdict",
        "0.22,0.11",
        200,
        "a language model that learnt from the world's text",
        # An easy task and one of details, with more than a word to say; colours and shapes are answered as things are found.
        "existence,reading",
        groups=("in_llm", "kv_cache"),
        models=(reference_smol.NAME,),
        dtype="float32",
        settings=(1, 2),
        batch_size=10,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="those of the series if not given")
    parser.add_argument("--series", choices=SERIES, default="first")
    parser.add_argument("--workers", type=int, help="measure so many cells side by side, on Ray")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results")
    arguments = parser.parse_args()
    series = SERIES[arguments.series]
    models = series.models if arguments.models is None else filter(None, arguments.models.split(","))
    for model in models:
        folder = arguments.folder / series.stem(model)
        measure(model, series, arguments.workers, folder)
        write(numbers(model, series, _finished(Results.open(folder))), series.path(model))
    print(*write_pages(ROOT / "docs", all_numbers()), sep="\n")


def measure(model: str, series: Series, workers: int | None, folder: Path) -> None:
    """Run the bench, going on where it stopped; cells that fail are in the folder's failures.json."""
    learnt = [name for name, found in checkpoint.evaluation(model).items() if not found["below_floor"]]
    request = BenchRequest(
        model=model,
        tasks=None if series is SERIES["first"] else series.tasks or ",".join(learnt),
        methods=",".join(_of_series(model, series)),
        keep=series.keeps,
        n=series.n,
        seed=0,
        out=folder,
        resume=True,
        device="auto",
        dtype=series.dtype,
        batch_size=series.batch_size,
        companion=None,
        # Speeds are means over tasks; timing more of each would take a quarter of the time.
        timed=1,
        ray=THIS_MACHINE if workers else None,
        workers=workers,
    )
    try:
        bench(request)
    except typer.Exit as stop:
        if stop.exit_code != CELLS_FAILED:
            raise


def _of_series(model: str, series: Series) -> list[str]:
    """The recipes that a series is to have rows of; baselines are measured beside any."""
    unwanted = {f"{method}({budgets[i]})" for method, budgets in BUDGETS.items() for i in {0, 1, 2} - {*series.settings}}
    recipes = [recipe for recipe in hosted(model)[0] if recipe not in {*REFERENCE_POINTS, *unwanted}]
    if series is SERIES["first"]:
        return recipes
    if series.groups:
        known = registry.methods()
        return [recipe for recipe in recipes if known[recipe.partition("(")[0]].group in series.groups]
    there = {row.mean.method.partition("(")[0] for row in read(SERIES["first"].path(model)).rows}
    return [recipe for recipe in recipes if recipe.partition("(")[0] not in there]


def hosted(model: str) -> tuple[list[str], list[Verdict]]:
    """The recipes that run on a model and why the other methods do not, but for those that replace weights.

    `benchmarks.quantization` is about these.
    """
    loaded = checkpoint.load(model, "cpu", "float32")
    parts = anatomy(loaded.model)
    traits = parts.traits(loaded.companion is not None)
    recipes, refused, known = [], [], registry.methods()
    for verdict in verdicts({model: loaded.model}, companion=loaded.companion is not None):
        if issubclass(known[verdict.method], Weights):
            continue
        recipe = (RECIPES if verdict.reason is None else INSTEAD).get(verdict.method, verdict.method)
        try:
            check(Recipe.parse(recipe), parts, traits)
            recipes += [f"{recipe}({budget})" for budget in BUDGETS[recipe]] if recipe in BUDGETS else [recipe]
        except FoveateError:
            refused.append(verdict)
    return recipes, refused


def all_numbers() -> list[Numbers]:
    """Of all models, series by series."""
    return sorted(
        map(read, PAGES.glob("*.jsonl")),
        key=lambda each: (each.model, [*(s.name for s in SERIES.values())].index(each.series)),
    )


def numbers(model: str, series: Series, results: Results) -> Numbers:
    """What the pages are written from."""
    measured = checkpoint.evaluation(model)
    names = dict.fromkeys(record.task for record in results.records)
    tasks = {name: Task(measured[name]["majority"], measured[name]["below_floor"]) for name in names}
    rivals = _rivals(means(results.records, results.pairs))
    cells: dict[tuple[str, str], dict[str, Cell]] = {}
    for record in results.records:
        found = Cell(record.score, record.score_low, record.score_high, _against_random(results, record, rivals))
        cells.setdefault(record.key[1:], {})[record.task] = found
    learnt = [record for record in results.records if not tasks[record.task].below_floor]
    rows = [Row(mean, cells[mean.key[1:]]) for mean in means(learnt, results.pairs)]
    settings = results.settings
    refused = {verdict.method: str(verdict.reason) for verdict in hosted(model)[1]}
    return Numbers(model, series.name, series.title, settings.n, settings.device, settings.dtype, tasks, refused, rows)


def _finished(results: Results) -> Results:
    """The results without the tasks of which much is still to be measured."""
    tried = Counter(record.task for record in results.records)
    tried.update(each["task"] for each in results.document("failures.json") or [])
    results.records = [record for record in results.records if tried[record.task] >= _MOST * max(tried.values())]
    return results


def _rivals(over_tasks: Sequence[Mean]) -> dict[str, str]:
    """For every method without a budget, that of `random` to compare it with: the largest that is as fast."""
    random = sorted((mean for mean in over_tasks if mean.method == "random"), key=lambda mean: mean.speedup)
    found = {}
    for mean in over_tasks:
        rival = next((each for each in random if each.speedup >= mean.speedup), None)
        if not keep_text(mean.keep) and rival is not None:
            found[mean.method] = keep_text(rival.keep)
    return found


def _against_random(results: Results, record: Record, rivals: Mapping[str, str]) -> int:
    """1 if better than ``random`` at a budget no slower beyond noise, -1 if worse, else 0."""
    budget = keep_text(record.keep) or rivals.get(record.method, "")
    random = results.record((record.task, "random", budget))
    if random is None or record.method in REFERENCE_POINTS:
        return 0
    scores, others = results.scores(record), results.scores(random)
    return 1 if beats(scores, others) else -1 if beats(others, scores) else 0


if __name__ == "__main__":
    main()
