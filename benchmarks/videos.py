"""vLLM's own pruning of videos, EVS and VidCom2, beside recipes and baselines, at equal tokens.

    python -m benchmarks.videos            # about ten minutes on one core
    python -m benchmarks.videos --n 0      # only writes the page, from docs/results/videos.json

The generated tasks whose pictures are the frames of a video, on the reference model that learnt them, at a quarter of the
tokens of every video: as `foveate bench --films` has it, where methods meet a video, and as without, where each frame is a
picture to them. Goes on where it stopped. Writes docs/results/videos.json and docs/results/videos.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

from foveate.bench.cells import plan
from foveate.bench.folder import ResultFolder, Settings
from foveate.bench.measure import Bench
from foveate.bench.questions import ask
from foveate.bench.run import run
from foveate.bench.statistics import beats, difference, interval
from foveate.cli.progress import BenchProgress
from foveate.core.recipe import NONE

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "results" / "videos"
MODEL, TASKS, KEEP = "reference-qwen", ("events", "stream"), 0.25
EVS, VIDCOM2, RANDOM = f"evs(rate={1 - KEEP})", "vidcom2", "random"
RECIPES = ("hiprune", "scope(saliency='received')")
"""Of those that run on vLLM, too: they read no question."""
VIDEO, PICTURES = "one video", "pictures"
ARMS = {
    VIDEO: (NONE, EVS, VIDCOM2, *RECIPES, "uniform", RANDOM, "downsample"),
    PICTURES: (*RECIPES, RANDOM),
}

Row = Mapping[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=100, help="questions a task")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "videos")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file = OUT.with_suffix(".json")
    if arguments.n:
        rows = [row for shown in ARMS for row in measured(shown, arguments.n, arguments.folder)]
        versions = {"torch": torch.__version__, "transformers": transformers.__version__}
        found = {"model": MODEL, "n": arguments.n, "keep": KEEP, "versions": versions, "rows": rows}
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1)
        file.write_text(f'{head[:-2]},\n "rows": [\n{lines}\n ]\n}}\n')
    OUT.with_suffix(".md").write_text("\n".join(page(json.loads(file.read_text()))) + "\n")
    print(OUT.with_suffix(".md").read_text())


def measured(shown: str, n: int, folder: Path) -> list[dict[str, Any]]:
    """What the recipes score that meet the frames as ``shown``."""
    settings = Settings(MODEL, n, 0, "cpu", "bfloat16", 10, timed=1, films=shown == VIDEO)
    cells = plan(TASKS, ARMS[shown], [KEEP], points=())
    place = folder / shown.replace(" ", "-")
    results = ResultFolder(place, settings, resume=place.exists())
    progress = BenchProgress(Console(stderr=True), n)
    with progress:
        run(cells, partial(ask, settings), Bench.load(settings, TASKS[0]), results, progress)
    return [
        {
            "task": record.task,
            "shown": shown,
            "recipe": record.method,
            "tokens": record.visual_tokens,
            "evidence": record.evidence_recall,
            "scores": [round(score, 4) for score in results.scores(record)],
        }
        for record in results.records
    ]


def page(found: Mapping[str, Any]) -> list[str]:
    """The lines of the page."""
    rows, n = found["rows"], found["n"]
    kept = {task: sorted({row["tokens"] for row in rows if row["task"] == task}, reverse=True) for task in TASKS}
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        "# Videos: vLLM's own pruning beside recipes",
        "",
        f"Written by `python -m benchmarks.videos`: `{found['model']}` in bfloat16 on one thread of a CPU ({versions}), the",
        f"tasks `events` (6 frames) and `stream` (12 frames), {n} questions each, the same for all rows. vLLM's",
        "`--video-pruning-rate` and `--video-pruning-method` are `evs` and `vidcom2` here, which choose what vLLM's",
        "functions choose (`tests/data/vectors`). All run in transformers, before the language model.",
        "",
        "The model was trained on videos as rows of pictures, one a frame, and so it is asked. *One video*: methods meet",
        "them as the frames of one (`foveate bench --films`), as they would a real video, and the budget is of the whole.",
        "*Pictures*: each frame has a budget of its own; so does the plug-in for vLLM, which prunes no videos. There `evs`",
        "would leave all as it is.",
        "",
        _tokens(rows, kept),
        "Intervals are 95 % ones; drops are paired over the questions. *random*: better (+) or worse (-) than it, beyond",
        "noise. *Evidence*: share of the cells that show what was asked for. The model is small, and learnt these two tasks",
        "less well than others (a bench says *below floor*): compare rows, and expect nothing of other models.",
    ]
    for task in (*TASKS, None):
        lines += ["", f"## {task}" if task else "## Both", "", *_table(_of(rows, task))]
    return [*lines, "", *_verdicts(_of(rows, None))]


def _tokens(rows: Sequence[Row], kept: Mapping[str, Sequence[float]]) -> str:
    """Whether all rows are at the same number of tokens."""
    whole, cut = zip(*((counts[0], counts[1:]) for counts in kept.values()))
    if all(len(counts) == 1 for counts in cut):
        pairs = ", ".join(f"{left[0]:g} of {all_:g} (`{task}`)" for task, left, all_ in zip(kept, cut, whole))
        return f"Tokens of a video are the same in all rows, but for the whole: {pairs}."
    return "Tokens of a video differ between rows, as the tables say."


def _of(rows: Sequence[Row], task: str | None) -> dict[tuple[str, str], Row]:
    """Rows of a task by how they are shown and their recipe; of all tasks together for None."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in rows:
        if task in (None, row["task"]):
            one = found.setdefault((row["shown"], row["recipe"]), {"tokens": [], "evidence": [], "scores": []})
            one["tokens"].append(row["tokens"])
            one["evidence"].append(row["evidence"])
            one["scores"] += row["scores"]
    return dict(found)


def _table(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    base = rows[VIDEO, NONE]["scores"]
    lines = ["| recipe | frames are | tokens | score | drop | random | evidence |", "|---|---|--:|--:|--:|:-:|--:|"]
    for (shown, recipe), row in rows.items():
        scores = row["scores"]
        low, high = interval(scores)
        drop = difference(base, scores)
        random = rows[shown, RANDOM]["scores"]
        against = "+" if beats(scores, random) else "-" if beats(random, scores) else ""
        frames, lost = "" if recipe == NONE else shown, "" if recipe == NONE else _interval(drop.mean, drop.low, drop.high)
        lines.append(
            f"| `{recipe}` | {frames} | {_mean(row['tokens']):g} | {_interval(_mean(scores), low, high)} | {lost} "
            f"| {against} | {100 * _mean(row['evidence']):.0f} % |"
        )
    return lines


def _verdicts(rows: Mapping[tuple[str, str], Row]) -> list[str]:
    """Who is better than vLLM's two methods, and worse, over both tasks."""
    lines = []
    for own in (EVS, VIDCOM2):
        scores, said = rows[VIDEO, own]["scores"], []
        others = {key: row["scores"] for key, row in rows.items() if key[1] != NONE and key != (VIDEO, own)}
        found = {
            "better": [key for key, other in others.items() if beats(other, scores)],
            "worse": [key for key, other in others.items() if beats(scores, other)],
        }
        for word, chosen in found.items():
            said.append(f"{word}: {', '.join(f'`{recipe}` ({shown})' for shown, recipe in chosen) or 'none'}")
        lines.append(
            f"- Than `{own}` of one video, over both tasks, beyond noise, each comparison by itself: {'; '.join(said)}."
        )
    return lines


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _interval(value: float, low: float, high: float) -> str:
    return f"{100 * value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]"


if __name__ == "__main__":
    main()
