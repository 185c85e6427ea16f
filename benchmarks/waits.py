"""What each method costs the host: waits for the device, kernels to start and Python calls while decoding.

    python -m benchmarks.waits                                                   # about ten minutes
    python -m benchmarks.waits --before docs/waits.json                          # the numbers of an earlier run beside

Counts, not seconds, so the machine does not matter. Every registered method runs on a tiny LLaVA as the suite runs it
(`tests/waits.py`). Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from tests.suite.bodies import ONE, RAGGED
from tests.suite.pairs import variants
from tests.waits import STEPS, calls, kernels, waits

import foveate
from foveate.core import registry
from foveate.core.errors import FoveateError

BATCHES = {"one": ONE, "ragged": RAGGED}
COLUMNS = {
    "prefill_waits": "waits a prefill",
    "decode_waits": "waits a decode step",
    "decode_kernels": "kernels a decode step",
    "decode_calls": "Python calls a decode step",
}
COMPOSED = "hiprune(keep=9) + fastv(layer=2, keep=5) + snapkv(keep=0.5, window=4)"


def main() -> None:
    args = _arguments()
    recipes = list(_recipes())
    records = [
        record
        for layers in args.layers
        for recipe in track([None, *recipes], description=f"{layers} layers")
        for record in _measure(layers, recipe, args.sources)
    ]
    run = {
        "command": f"python -m benchmarks.waits --layers {' '.join(map(str, args.layers))}",
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"run": run, "records": records}, indent=1) + "\n")
    before = json.loads(Path(args.before).read_text())["records"] if args.before else []
    out.with_suffix(".md").write_text(_markdown(run, _by_recipe(records), _by_recipe(before)))
    print(out.with_suffix(".md").read_text())


def _recipes() -> Iterator[str]:
    yield "none"
    for name in registry.methods():
        yield from map(str, variants(name))
    yield COMPOSED


def _measure(layers: int, recipe: str | None, sources: bool) -> Iterator[dict[str, Any]]:
    for batch, samples in BATCHES.items():
        try:
            prefill, decode = waits(layers, samples, recipe)
        except FoveateError as error:
            print(f"skipped: {error}")
            return
        record = {
            "layers": layers,
            "batch": batch,
            "recipe": recipe,
            "prefill_waits": len(prefill),
            "decode_waits": len(decode),
            "decode_kernels": kernels(layers, samples, recipe),
            "decode_calls": calls(layers, samples, recipe),
        }
        if sources:
            found = {"prefill": prefill, "decode": decode}
            record["sources"] = {phase: dict(Counter(map(str, of)).most_common()) for phase, of in found.items()}
        yield record


Records = dict[tuple[int, str, str | None], dict[str, Any]]


def _by_recipe(records: list[dict[str, Any]]) -> Records:
    return {(record["layers"], record["batch"], record["recipe"]): record for record in records}


def _markdown(run: dict[str, Any], records: Records, before: Records) -> str:
    lines = [
        "# Waits and extra work",
        "",
        f"Written by `{run['command']}`",
        f"(torch {run['torch']}, transformers {run['transformers']}).",
        "",
        "How often the host waits for the device (it reads a result, or copies ordinary memory there), what it starts there",
        "and what Python does, on a tiny LLaVA with as many encoder blocks as decoder layers: for one prompt / for a ragged",
        f"batch of three prompts. Of the decode steps the one with the most is given, of {STEPS}. Everything is what comes",
        "to the unmodified model's own, which stands above each table.",
    ]
    if before:
        lines.append("Where an earlier run had another number, it stands in front.")
    for layers in dict.fromkeys(layers for layers, _, _ in records):
        lines += ["", f"## {layers} layers", "", *_table(layers, records, before)]
    return "\n".join(lines) + "\n"


def _table(layers: int, records: Records, before: Records) -> list[str]:
    lines = [
        f"Unmodified: {' / '.join(str(records[layers, batch, None][key]) for batch in BATCHES)} {what}."
        for key, what in COLUMNS.items()
    ]
    lines += ["", f"| recipe | {' | '.join(COLUMNS.values())} |", "|---|" + "---|" * len(COLUMNS)]
    for recipe in dict.fromkeys(recipe for depth, _, recipe in records if recipe and depth == layers):
        cells = []
        for key in COLUMNS:
            now, then = (_cell(found, layers, recipe, key) for found in (records, before))
            cells.append(now if then in (now, "") else f"{then} → {now}")
        lines.append(f"| `{recipe}` | {' | '.join(cells)} |")
    return lines


def _cell(records: Records, layers: int, recipe: str, key: str) -> str:
    """What comes to the unmodified model's own, of each batch; nothing where that was not measured."""
    parts = []
    for batch in BATCHES:
        if (layers, batch, recipe) not in records:
            return ""
        own = records[layers, batch, None][key]
        more = records[layers, batch, recipe][key] - own
        share = f" ({more / own:+.0%})" if key in ("decode_kernels", "decode_calls") else ""
        parts.append(f"{more}{share}")
    return " / ".join(parts)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32], help="depths of the model")
    parser.add_argument("--before", help="results of an earlier run (.json), whose numbers are to stand in front")
    parser.add_argument("--sources", action="store_true", help="where each wait comes from, in the .json")
    parser.add_argument("--out", default="docs/waits", help="path of the results, without suffix")
    return parser.parse_args()


if __name__ == "__main__":
    main()
