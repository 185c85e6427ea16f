"""Every registered method on the reference models at three budgets, and the page about it.

python benchmarks/results.py                 # measures what is missing in runs/results, then writes docs/results.md
python benchmarks/results.py --models ""     # only writes the page from what is there

It takes hours on a CPU. Stop it whenever you like: the same command goes on. --workers 2 measures two cells at a time.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import typer

from foveate import checkpoint, reference
from foveate.bench.cells import REFERENCE_POINTS, Key, keep_text, parse_keeps
from foveate.bench.folder import Results
from foveate.bench.records import Record
from foveate.bench.statistics import beats
from foveate.bench.summary import Mean, means
from foveate.cli.bench import CELLS_FAILED, BenchRequest, bench
from foveate.cli.ray_option import THIS_MACHINE
from foveate.core.errors import FoveateError
from foveate.core.recipe import NONE, Recipe
from foveate.engine.check import check
from foveate.engine.hosting import Verdict, verdicts
from foveate.models import anatomy
from foveate.report.picture import draw_quality_speed

KEEPS = "0.33,0.22,0.11"
RECIPES = {
    # Prompts of a dozen words have no window of 32.
    "snapkv": "snapkv(window=8)",
    "mixkv": "mixkv(window=8)",
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

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="reference-qwen,reference-tiles")
    parser.add_argument("--n", type=int, default=300, help="questions per task")
    parser.add_argument("--workers", type=int, help="measure so many cells side by side, on Ray")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    for model in filter(None, arguments.models.split(",")):
        measure(model, arguments.n, arguments.workers, arguments.folder / model)
    done = {
        model: _finished(Results.open(arguments.folder / model))
        for model in reference.MODELS
        if (arguments.folder / model).is_dir()
    }
    arguments.page.write_text("\n".join(page(done, arguments.page)) + "\n")
    print(arguments.page)


def measure(model: str, n: int, workers: int | None, folder: Path) -> None:
    """Run the bench, going on where it stopped; cells that fail are in the folder's failures.json."""
    recipes, _ = hosted(model)
    request = BenchRequest(
        model=model,
        tasks=None,
        methods=",".join(recipe for recipe in recipes if recipe not in REFERENCE_POINTS),
        keep=KEEPS,
        n=n,
        seed=0,
        out=folder,
        resume=True,
        device="auto",
        # As large models are run; on a CPU it is twice as fast, too.
        dtype="bfloat16",
        batch_size=25,
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


def hosted(model: str) -> tuple[list[str], list[Verdict]]:
    """The recipes that run on a model and why the other methods do not."""
    loaded = checkpoint.load(model, "cpu", "float32")
    parts = anatomy(loaded.model)
    traits = parts.traits(loaded.companion is not None)
    recipes, refused = [], []
    for verdict in verdicts({model: loaded.model}, companion=loaded.companion is not None):
        recipe = (RECIPES if verdict.reason is None else INSTEAD).get(verdict.method, verdict.method)
        try:
            check(Recipe.parse(recipe), parts, traits)
            recipes += [f"{recipe}({budget})" for budget in BUDGETS[recipe]] if recipe in BUDGETS else [recipe]
        except FoveateError:
            refused.append(verdict)
    return recipes, refused


def page(done: dict[str, Results], path: Path) -> list[str]:
    """The page in Markdown, line by line; its pictures are drawn beside it."""
    lines = [
        "# Results",
        "",
        "Written by `benchmarks/results.py`: every registered method on the embedded reference models, at three budgets.",
        "Scores in percent ± half the 95 % interval, on the same questions for all. **Bold**: better than `random` at the",
        "same budget beyond noise (paired bootstrap); *italic*: worse. Methods without `keep` have three settings instead",
        "and stand against the largest budget of `random` that is as fast. `keep` is the share of visual tokens, of",
        "cached entries for cache methods, which read the whole prompt before they drop any. *Evidence* is the share of",
        "the patches that hold the answer entering the last layer, *speed-up* that of the language model's prefill (timed",
        "right beside the unmodified model), *of limit* what that is of the physical limit, a model that never had the",
        "other tokens; all are means over tasks. A cell times one batch, and other cells may be measured on other cores",
        "meanwhile: these times are rough ([efficiency.md](efficiency.md) has steady ones). The models are small: what a",
        "method does to their answers says more about where it looks than about the loss on a large model.",
        "",
        "`hidrop` is made for models that were trained with its schedule, which these were not. `alvts` drops nothing: its",
        "`keep` is what each layer works on. With `sparsevila` decoding reads a quarter of what `keep` leaves.",
    ]
    for model, results in done.items():
        over_tasks = means(results.records, results.pairs)
        picture = path.with_name(f"{path.stem}-{model}.png")
        draw_quality_speed(_complete(over_tasks), picture, model)
        lines += ["", f"## {model}", "", *_model(model, results, over_tasks)]
        lines += ["", f"![Score retained against prefill speed-up]({picture.name})"]
    return lines


def _finished(results: Results) -> Results:
    """The results without the tasks that are still being measured."""
    tried = Counter(record.task for record in results.records)
    tried.update(each["task"] for each in results.document("failures.json") or [])
    results.records = [record for record in results.records if tried[record.task] == max(tried.values())]
    return results


def _complete(over_tasks: Sequence[Mean]) -> list[Mean]:
    """Those over all tasks that were measured so far."""
    every = max((mean.tasks for mean in over_tasks), default=0)
    return [mean for mean in over_tasks if mean.tasks == every]


def _model(model: str, results: Results, over_tasks: Sequence[Mean]) -> list[str]:
    measured = reference.evaluation(reference.path(model))
    tasks = list(dict.fromkeys(record.task for record in results.records))
    below = [task for task in tasks if measured.get(task, {}).get("below_floor")]
    missing = [task for task in measured if task not in tasks]
    lines = [f"n = {results.settings.n} questions a task, {results.settings.device} {results.settings.dtype}."]
    if below:
        lines += [f"Below floor, that is not learnt well enough to measure methods on: {', '.join(below)}."]
    if missing:
        lines += [f"Not measured yet: {', '.join(missing)}."]
    rivals = _rivals(over_tasks)
    verdicts = {record.key: _against_random(results, record, rivals) for record in results.records}
    lines += ["", *_story(over_tasks, results.records, verdicts), ""]
    for keep in ("", *map(keep_text, parse_keeps(KEEPS))):
        rows = [mean for mean in over_tasks if keep_text(mean.keep) == keep]
        if rows:
            lines += [*_table(results, rows, tasks, below, verdicts), ""]
    _, refused = hosted(model)
    lines += [f"n/a: `{verdict.method}` ({verdict.reason})" + "  " for verdict in refused]
    return lines


def _table(
    results: Results, rows: Sequence[Mean], tasks: Sequence[str], below: Sequence[str], verdicts: Mapping[Key, int]
) -> list[str]:
    heads = [f"{task} (below floor)" if task in below else task for task in tasks]
    keep = keep_text(rows[0].keep)
    first = f"keep {keep}" if keep else "without a budget"
    lines = [f"| {first} | {' | '.join(heads)} | evidence | speed-up | of limit |", "|" + "---|" * (len(tasks) + 4)]
    if not keep:
        measured = reference.evaluation(reference.path(results.settings.model))
        constants = [f"{100 * measured[task]['majority']:.0f}" if task in measured else "–" for task in tasks]
        lines += [f"| always the same answer | {' | '.join(constants)} | | | |"]
    for mean in rows:
        cells = [_cell(results.record((task, *mean.key[1:])), verdicts) for task in tasks]
        evidence = "–" if mean.evidence_recall is None else f"{100 * mean.evidence_recall:.0f} %"
        limit = "–" if mean.efficiency is None else f"{100 * mean.efficiency:.0f} %"
        lines.append(f"| `{mean.method}` | {' | '.join(cells)} | {evidence} | {mean.speedup:.2f} | {limit} |")
    return lines


def _cell(record: Record | None, verdicts: Mapping[Key, int]) -> str:
    if record is None:
        return "–"
    text = f"{100 * record.score:.0f} ± {50 * (record.score_high - record.score_low):.0f}"
    return {1: f"**{text}**", -1: f"*{text}*"}.get(verdicts[record.key], text)


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


def _story(over_tasks: Sequence[Mean], records: Sequence[Record], verdicts: Mapping[Key, int]) -> list[str]:
    """What the tables say, in sentences, and how often each method does better than random selection."""
    plain = [mean for mean in over_tasks if mean.method == NONE]
    sentences = [
        f"The unmodified model scores {100 * mean.score:.0f} % in the mean over {mean.tasks} tasks." for mean in plain
    ]
    for keep in map(keep_text, parse_keeps(KEEPS)):
        rows = [mean for mean in _complete(over_tasks) if keep_text(mean.keep) == keep]
        ranked = sorted((mean for mean in rows if mean.method not in REFERENCE_POINTS), key=lambda mean: -mean.score)
        random = next((mean for mean in rows if mean.method == "random"), None)
        if ranked and random is not None:
            best = ", ".join(f"`{mean.method}` {_short(mean)}" for mean in ranked[:3])
            sentences.append(f"At {keep} the best are {best}; `random` has {_short(random)}.")
    by_method = _by_method(records, verdicts)
    losers = [f"`{method}`" for method, found in by_method.items() if sum(verdict for _, verdict in found) < 0]
    if losers:
        where = Counter(record.task for record in records if verdicts[record.key] < 0)
        most = ", ".join(f"{task} ({times})" for task, times in where.most_common(3))
        sentences.append(f"More often worse than `random` than better are {', '.join(losers)}; most often on {most}.")
    lines = [" ".join(sentences), "", "Against `random`, all tasks and budgets:", ""]
    lines += ["| method | better | no different | worse | worse on |", "|---|---|---|---|---|"]
    for method, found in by_method.items():
        counts = [sum(verdict == sign for _, verdict in found) for sign in (1, 0, -1)]
        worse = Counter(record.task for record, verdict in found if verdict < 0)
        listed = ", ".join(f"{task} ({times})" for task, times in worse.most_common())
        lines.append(f"| `{method}` | {' | '.join(map(str, counts))} | {listed} |")
    return lines


def _short(mean: Mean) -> str:
    return f"{100 * mean.score:.0f} % ({mean.speedup:.1f}x)"


def _by_method(records: Sequence[Record], verdicts: Mapping[Key, int]) -> dict[str, list[tuple[Record, int]]]:
    """The records of a method and how they did against random selection; the method that was better most often first."""
    found: dict[str, list[tuple[Record, int]]] = {}
    for record in records:
        if record.method not in REFERENCE_POINTS:
            found.setdefault(record.method, []).append((record, verdicts[record.key]))
    return dict(sorted(found.items(), key=lambda each: -sum(verdict for _, verdict in each[1]) / len(each[1])))


if __name__ == "__main__":
    main()
