"""Methods on a language model that learnt from the world's text, beside the small models: docs/results/verdict.md.

python -m benchmarks.verdict     # writes the page, from what `python -m benchmarks.results` left in docs/results/*.jsonl

Compared are rows of one method at one budget, on the tasks that both models of a pair learnt.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from benchmarks.results_page import Numbers, Row, cache_share, read
from scipy.stats import spearmanr

from foveate.bench.cells import REFERENCE_POINTS, keep_text
from foveate.checkpoint import reference_smol
from foveate.core import registry
from foveate.core.recipe import NONE
from foveate.report.training_mark import mark

RESULTS = Path(__file__).parent.parent / "docs" / "results"
LARGE, SMALL = reference_smol.NAME, ("reference-tiles", "reference-qwen")
SERIES = ("", "later", "verdict")
"""Those with the budgets that are compared; series of the same model share no row but baselines."""
PROBES = {
    "horizon": "Score when all visual tokens leave before a layer",
    "embedlens": "Visual tokens that lie at words which do not depend on the picture, and the score without them",
}
"""Their pictures beside the page."""
BETTER, WORSE, EITHER = "better", "worse", "as good"

Key = tuple[str, str]


class Found(NamedTuple):
    """What a method retains of the unmodified score over the tasks in common; on how many it beats `random`, or loses.

    ``cache``: its bytes over the unmodified model's.
    """

    retained: float
    better: int
    worse: int
    cache: str

    @property
    def verdict(self) -> str:
        """Against ``random``, over these tasks."""
        return BETTER if self.better > self.worse else WORSE if self.worse > self.better else EITHER


def main() -> None:
    measured = [numbers for numbers in map(read, RESULTS.glob("*.jsonl")) if numbers.series in SERIES]
    page = RESULTS / "verdict.md"
    page.write_text("\n".join(lines(measured)) + "\n")
    print(page.read_text())


def lines(measured: Sequence[Numbers]) -> Iterator[str]:
    """The page."""
    tasks = {model: common_tasks(measured, model) for model in (LARGE, *SMALL)}
    found = {model: of_model([each for each in measured if each.model == model], tasks[model]) for model in tasks}
    listed = "; ".join(f"{', '.join(tasks[model])} on `{model}`" for model in SMALL)
    n = next(numbers.n for numbers in measured if numbers.model == LARGE)
    yield from (
        "# The verdict of a language model that learnt from text",
        "",
        "Written by `python -m benchmarks.verdict`. The small reference models learnt generated questions from nothing;",
        f"behind the eyes of `{LARGE}` is SmolLM2, which learnt from the world's text ([what it",
        f"is](../text.md#reference-smol)). The same methods at the same budgets: {', '.join(tasks[LARGE])} on `{LARGE}`,",
        f"{n} questions each, and what of that the others learnt, too: {listed}",
        "([their pages](../results.md)). A dash: not measured, or not on this model.",
        "",
        "*Retained* is the score over the unmodified model's; in brackets on how many of these tasks a method is better",
        "and worse than `random` at the same budget beyond noise; *cache*: its bytes over the unmodified model's, since a",
        "budget is not a share of the same in all methods ([keep](../keep.md)). Methods of the cache read the whole",
        "picture before they drop any of it, so that an answer of one word says nothing of them, and one of letters does;",
        "[SmolLM2](smol.md) has more about them.",
    )
    known = registry.methods()
    for group, title in (("in_llm", "Between the layers"), ("kv_cache", "On the cache")):
        rows = [key for key in found[LARGE] if (method := known.get(name(key))) is not None and method.group == group]
        if rows:
            yield from ("", f"## {title}", "", *_table(sorted(rows, key=lambda key: -found[LARGE][key].retained), found))
    yield from ("", "## Baselines", "", *_table([key for key in found[LARGE] if name(key) in REFERENCE_POINTS], found))
    yield from ("", "## Do the models agree?", "", *_agreement(measured, found))
    yield from ("", "## Where this model reads the picture", "", *_probes())


def common_tasks(measured: Sequence[Numbers], *models: str) -> list[str]:
    """Those that these models learnt, as far as they were measured on the large one."""
    learnt = [{task for numbers in measured if numbers.model == model for task in numbers.learnt} for model in models]
    order = [task for numbers in measured if numbers.model == LARGE for task in numbers.learnt]
    return [task for task in dict.fromkeys(order) if all(task in those for those in learnt)]


def of_model(measured: Sequence[Numbers], tasks: Sequence[str]) -> dict[Key, Found]:
    """Of each method and budget that has all of the tasks; of several series the first."""
    found: dict[Key, Found] = {}
    for numbers in sorted(measured, key=lambda each: SERIES.index(each.series)):
        plain = next((row for row in numbers.rows if row.mean.method == NONE), None)
        for row in numbers.rows:
            if plain is not None and row is not plain and all(task in row.cells and task in plain.cells for task in tasks):
                found.setdefault((row.mean.method, keep_text(row.mean.keep)), _found(row, plain, tasks))
    return found


def name(key: Key) -> str:
    """The method's."""
    return key[0].partition("(")[0]


def _found(row: Row, plain: Row, tasks: Sequence[str]) -> Found:
    signs = [row.cells[task].against_random for task in tasks]
    retained = sum(row.cells[task].score for task in tasks) / sum(plain.cells[task].score for task in tasks)
    return Found(retained, signs.count(1), signs.count(-1), cache_share(row.mean, plain.mean))


def _table(keys: Sequence[Key], found: Mapping[str, Mapping[Key, Found]]) -> Iterator[str]:
    yield f"| method | keep or settings | {' | '.join(f'`{model}`' for model in found)} | cache on `{LARGE}` |"
    yield f"|---|---|{'--:|' * (len(found) + 1)}"
    for key in keys:
        method, _, settings = key[0].partition("(")
        budget = key[1] or (f"`{settings.removesuffix(')')}`" if settings else "")
        cells = (_cell(rows.get(key), baseline=name(key) in REFERENCE_POINTS) for rows in found.values())
        yield f"| `{method}`{mark(key[0])} | {budget} | {' | '.join(cells)} | {found[LARGE][key].cache} |"


def _cell(found: Found | None, *, baseline: bool) -> str:
    if found is None:
        return "–"
    against = "" if baseline else f" ({found.better} better, {found.worse} worse)"
    return f"{100 * found.retained:.0f} %{against}"


def _agreement(measured: Sequence[Numbers], found: Mapping[str, Mapping[Key, Found]]) -> Iterator[str]:
    """Of pairs of models: whether the same methods retain most, and whether they are on the same side of random."""
    pruning = {key for rows in found.values() for key in rows if _prunes(key)}
    yield "Methods between the layers: the rank correlation (Spearman) of what they retain, and how many are on the same"
    yield "side of `random`, each pair of models on the tasks that both learnt."
    yield ""
    yield "| models | methods and budgets in both | rank correlation | same side of `random` |"
    yield "|---|--:|--:|--:|"
    for one, other in combinations(found, 2):
        tasks = common_tasks(measured, one, other)
        left, right = (of_model([each for each in measured if each.model == model], tasks) for model in (one, other))
        both = sorted(pruning & left.keys() & right.keys())
        if len(both) < 3:
            continue
        pairs = [(left[key], right[key]) for key in both]
        ranks = spearmanr([pair[0].retained for pair in pairs], [pair[1].retained for pair in pairs]).statistic
        same = sum(pair[0].verdict == pair[1].verdict for pair in pairs)
        yield f"| `{one}`, `{other}` | {len(both)} | {ranks:.2f} | {same} |"
    yield ""
    for title, chosen in _differences(found, sorted(pruning)).items():
        shown = ", ".join(f"`{key[0]}`{f' at {key[1]}' if key[1] else ''}" for key in chosen)
        yield f"- {title}: {shown or 'none'}."
    yield ""
    yield "What that says about choosing a method: [which method](../choose.md)."


def _probes() -> Iterator[str]:
    """The pictures of the probes, which are drawn by `foveate probe`."""
    yield "By `foveate probe information-horizon` and `foveate probe embedlens` ([what they measure](../probes.md))."
    for name, title in PROBES.items():
        yield from ("", f"![{title}]({LARGE}-{name}.png)")


def _differences(found: Mapping[str, Mapping[Key, Found]], keys: Sequence[Key]) -> dict[str, list[Key]]:
    """Methods by what the models say of them, of those that were measured on all that host them."""
    here = [key for key in keys if key in found[LARGE] and any(key in found[model] for model in SMALL)]
    sides = {key: {found[model][key].verdict for model in SMALL if key in found[model]} for key in here}
    own = {key: found[LARGE][key].verdict for key in here}
    return {
        "Better than `random` on all": [key for key in here if own[key] == BETTER and sides[key] == {BETTER}],
        f"Better on `{LARGE}`, on no small model": [key for key in here if own[key] == BETTER and BETTER not in sides[key]],
        f"Better on a small model, not on `{LARGE}`": [key for key in here if own[key] != BETTER and BETTER in sides[key]],
        f"Worse on `{LARGE}`": [key for key in here if own[key] == WORSE],
        f"Worse on a small model, not on `{LARGE}`": [key for key in here if own[key] != WORSE and WORSE in sides[key]],
    }


def _prunes(key: Key) -> bool:
    method = registry.methods().get(name(key))
    return method is not None and method.group == "in_llm"


if __name__ == "__main__":
    main()
