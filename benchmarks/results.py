"""Every registered method on the reference models at three budgets, and the page about it.

python benchmarks/results.py                 # measures what is missing in runs/results, then writes docs/results.md
python benchmarks/results.py --models ""     # only writes the page from what is there

It takes hours on a CPU. Stop it whenever you like: the same command goes on.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import typer

from saccade import reference
from saccade.bench import checkpoint
from saccade.bench.cells import REFERENCE_POINTS, keep_text, parse_keeps
from saccade.bench.folder import Results
from saccade.bench.records import Record
from saccade.bench.statistics import beats
from saccade.bench.summary import Mean, means
from saccade.cli.bench import BenchRequest, bench
from saccade.engine.hosting import Verdict, verdicts

KEEPS = "0.33,0.22,0.11"
RECIPES = {
    # Prompts of a dozen words have no window of 32.
    "snapkv": "snapkv(window=8)",
    "mixkv": "mixkv(window=8)",
    # In CLIP's space the published sign misleads on the reference tower; docs/architecture.md says more.
    "cdpruner": "cdpruner(relevance='embedding')",
}
"""How methods are run whose defaults do not suit these models."""

ROOT = Path(__file__).parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(reference.MODELS))
    parser.add_argument("--n", type=int, default=300, help="questions per task")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "results")
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md")
    arguments = parser.parse_args()
    for model in filter(None, arguments.models.split(",")):
        measure(model, arguments.n, arguments.folder / model)
    done = {
        model: Results.open(arguments.folder / model) for model in reference.MODELS if (arguments.folder / model).is_dir()
    }
    arguments.page.write_text("\n".join(page(done)) + "\n")
    print(arguments.page)


def measure(model: str, n: int, folder: Path) -> None:
    """Run the bench, going on where it stopped; cells that fail are in the folder's failures.json."""
    recipes = [RECIPES.get(verdict.method, verdict.method) for verdict in hosted(model) if verdict.reason is None]
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
        dtype="auto",
        batch_size=25,
        companion=None,
    )
    try:
        bench(request)
    except typer.Exit as stop:
        if stop.exit_code != 1:
            raise


def hosted(model: str) -> list[Verdict]:
    """Which methods run on a model, and why not where they do not."""
    loaded = checkpoint.load(model, "cpu", "float32")
    return verdicts({model: loaded.model}, companion=loaded.companion is not None)


def page(done: dict[str, Results]) -> list[str]:
    """The page in Markdown, line by line."""
    lines = [
        "# Results",
        "",
        "Written by `benchmarks/results.py`: every registered method on the embedded reference models, at three budgets.",
        "Scores in percent ± half the 95 % interval, on the same questions for all. **Bold**: better than `random` at the",
        "same budget beyond noise (paired bootstrap); *italic*: worse. *Evidence* is the share of the patches that hold",
        "the answer entering the last layer, *speed-up* that of the language model's prefill; both are means over tasks.",
        "`keep` is the share of visual tokens, of cached entries for cache methods; methods without one decide",
        "themselves. The models are small: what a method does to their answers says more about where it looks than about",
        "the loss on a large model.",
    ]
    for model, results in done.items():
        lines += ["", f"## {model}", "", *_model(model, results)]
    return lines


def _model(model: str, results: Results) -> list[str]:
    measured = reference.evaluation(reference.path(model))
    tasks = list(dict.fromkeys(record.task for record in results.records))
    below = [task for task in tasks if measured.get(task, {}).get("below_floor")]
    lines = [f"n = {results.settings.n} questions a task, {results.settings.device} {results.settings.dtype}."]
    if below:
        lines += [f"Below floor, that is not learnt well enough to measure methods on: {', '.join(below)}."]
    over_tasks = means(results.records, results.speedup)
    lines += ["", *_story(results, over_tasks, tasks), ""]
    for keep in ("", *map(keep_text, parse_keeps(KEEPS))):
        lines += [*_table(results, [mean for mean in over_tasks if keep_text(mean.keep) == keep], tasks, below), ""]
    lines += [f"n/a: `{v.method}` ({v.reason})" + "  " for v in hosted(model) if v.reason is not None]
    return lines


def _table(results: Results, rows: Sequence[Mean], tasks: Sequence[str], below: Sequence[str]) -> list[str]:
    heads = [f"{task} (below floor)" if task in below else task for task in tasks]
    lines = [
        f"| keep {keep_text(rows[0].keep)} | {' | '.join(heads)} | evidence | speed-up |"
        if keep_text(rows[0].keep)
        else f"| without a budget | {' | '.join(heads)} | evidence | speed-up |",
        "|" + "---|" * (len(tasks) + 3),
    ]
    if not keep_text(rows[0].keep):
        measured = reference.evaluation(reference.path(results.settings.model))
        constants = [f"{100 * measured[task]['majority']:.0f}" if task in measured else "–" for task in tasks]
        lines += [f"| always the same answer | {' | '.join(constants)} | | |"]
    for mean in rows:
        cells = [_cell(results, results.record((task, *mean.key[1:]))) for task in tasks]
        evidence = "–" if mean.evidence_recall is None else f"{100 * mean.evidence_recall:.0f} %"
        lines.append(f"| `{mean.method}` | {' | '.join(cells)} | {evidence} | {mean.speedup:.2f} |")
    return lines


def _cell(results: Results, record: Record | None) -> str:
    if record is None:
        return "–"
    text = f"{100 * record.score:.0f} ± {50 * (record.score_high - record.score_low):.0f}"
    return {1: f"**{text}**", -1: f"*{text}*"}.get(_against_random(results, record), text)


def _against_random(results: Results, record: Record) -> int:
    """1 if better than ``random`` at the same budget beyond noise, -1 if worse, else 0."""
    random = results.record((record.task, "random", keep_text(record.keep)))
    if random is None or record.method in REFERENCE_POINTS:
        return 0
    scores, others = results.scores(record), results.scores(random)
    return 1 if beats(scores, others) else -1 if beats(others, scores) else 0


def _story(results: Results, over_tasks: Sequence[Mean], tasks: Sequence[str]) -> list[str]:
    """What the tables say, in sentences."""
    sentences = []
    for keep in map(keep_text, parse_keeps(KEEPS)):
        rows = [mean for mean in over_tasks if keep_text(mean.keep) == keep and mean.tasks == len(tasks)]
        ranked = sorted((mean for mean in rows if mean.method not in REFERENCE_POINTS), key=lambda mean: -mean.score)
        random = next((mean for mean in rows if mean.method == "random"), None)
        if ranked and random is not None:
            best = ", ".join(f"`{mean.method}` {100 * mean.score:.0f} %" for mean in ranked[:3])
            sentences.append(f"At {keep} the best mean scores are {best}; `random` has {100 * random.score:.0f} %.")
    worse: dict[str, list[str]] = {}
    for record in results.records:
        if _against_random(results, record) < 0:
            worse.setdefault(record.method, []).append(f"{record.task} at {keep_text(record.keep)}")
    if worse:
        listed = "; ".join(f"`{method}` on {', '.join(cells)}" for method, cells in worse.items())
        sentences.append(f"Worse than `random` beyond noise: {listed}.")
    plain = [record.score for record in results.records if record.method == "none"]
    if plain:
        sentences.insert(0, f"The unmodified model scores {100 * fmean(plain):.0f} % in the mean.")
    return [" ".join(sentences)]


if __name__ == "__main__":
    main()
