"""Tokens a second, and bytes of the cache, of every method on the KV cache at LLaVA shapes with random weights.

    python -m benchmarks.decode                                                  # half an hour on one core
    python -m benchmarks.decode --shape 7b --device cuda --dtype bfloat16        # LLaVA-1.5-7B

Each round answers with 512 tokens under every recipe, and right before it with the whole cache, so drift of the machine
falls on both alike. The speed-up is the median of these pairs with its 95 % interval (of three or fewer their range). Writes
docs/decode.json, which the same settings go on with, and docs/decode.md.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from benchmarks.efficiency import build, prompt
from rich.progress import track
from torch import Tensor

import foveate
from foveate.bench.statistics import ratio
from foveate.core.report import Report

SHARE, TOKENS = 0.2, 512
RECIPES = (
    f"streamingllm(keep={SHARE})",
    f"h2o(keep={SHARE})",
    f"snapkv(keep={SHARE})",
    f"pyramidkv(keep={SHARE}, beta=4)",
    f"mixkv(keep={SHARE})",
    f"mixkv(keep={SHARE}, host='adakv')",
    f"prefixkv(keep={SHARE})",
    f"aircache(keep={SHARE})",
    f"flashcache(keep={SHARE})",
    f"hermes(keep={SHARE})",
    f"sparsevila(keep=1.0, decode_keep={SHARE})",
    "attentionpack",
    "kivi(bits=4)",
    "kivi(bits=2)",
)
"""At a fifth of the entries where a method drops any."""
OUT = Path(__file__).parent.parent / "docs" / "decode"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="small", choices=("small", "7b"))
    parser.add_argument("--images", type=int, default=4, help="of 576 tokens each")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    dtype = getattr(torch, arguments.dtype)
    model = build(arguments.shape, arguments.device, dtype)
    inputs = prompt(arguments.images, arguments.device, dtype)
    settings = {name: getattr(arguments, name) for name in ("shape", "images", "device", "dtype")}
    settings |= {"tokens": inputs["input_ids"].shape[1], "new": TOKENS, "torch": torch.__version__}
    file = OUT.with_suffix(".json")
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    if found.get("settings") != settings:
        found = {"settings": settings, "none": {"step_ms": []}, "recipes": {}}
    answer(model, inputs, "none", 8)
    for done in range(arguments.rounds):
        for recipe in track(RECIPES, description=f"round {done + 1}"):
            row = found["recipes"].setdefault(recipe, {"pairs": [], "step_ms": []})
            if len(row["pairs"]) > done:
                continue
            plain, report = (answer(model, inputs, each, TOKENS) for each in ("none", recipe))
            step, own = (1e3 * each.decode_seconds / each.decode_steps for each in (plain, report))
            found["none"]["step_ms"].append(step)
            found["none"]["kv_bytes"] = list(plain.kv_bytes)
            row["pairs"].append(step / own)
            row["step_ms"].append(own)
            row["kv_bytes"] = list(report.kv_bytes)
            row["kv_share"] = sum(report.kv_bytes) / sum(plain.kv_bytes)
            file.write_text(json.dumps(found, indent=1) + "\n")
    OUT.with_suffix(".md").write_text("\n".join(page(found)) + "\n")
    print(OUT.with_suffix(".md").read_text())


@torch.inference_mode()
def answer(model: Any, inputs: dict[str, Tensor], recipe: str, tokens: int) -> Report:
    """What so many new tokens cost under a recipe."""
    with foveate.attach(model, recipe) as session:
        model.generate(**inputs, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)
    return session.report


def page(found: dict[str, Any]) -> list[str]:
    settings, none = found["settings"], found["none"]
    steps = sorted(none["step_ms"])
    lines = [
        "# Decoding over a compressed cache",
        "",
        f"{settings['new']} new tokens behind a prompt of {settings['tokens']} at LLaVA shapes ({settings['shape']}) with",
        f"random weights, batch 1, {settings['device']} {settings['dtype']}, torch {settings['torch']}. Speed-up: of a step",
        "of decoding against the whole cache, each answer right behind one with it. Bytes are those of the cache",
        "when the answer ends; `sparsevila` keeps all and reads a part. Tokens a second are of the moment at which a recipe",
        "was measured; what compares recipes is the speed-up. Written by `python -m benchmarks.decode`.",
        "",
        "| recipe | tokens a second | speed-up | cache, MiB | of the whole | layers, MiB |",
        "|---|--:|--:|--:|--:|--:|",
        f"| `none` | {1e3 / steps[len(steps) // 2]:.0f} | 1.00 | {sum(none['kv_bytes']) / 2**20:.1f} | 100 % "
        f"| {_layers(none['kv_bytes'])} |",
    ]
    for recipe, row in found["recipes"].items():
        times, gain = sorted(row["step_ms"]), ratio(row["pairs"])
        spread = "" if gain.low is None else f" [{gain.low:.2f}, {gain.high:.2f}]"
        speed = f"{1e3 / times[len(times) // 2]:.0f} | {gain.value:.2f}{spread}"
        size = f"{sum(row['kv_bytes']) / 2**20:.1f} | {100 * row['kv_share']:.0f} % | {_layers(row['kv_bytes'])}"
        lines.append(f"| `{recipe}` | {speed} | {size} |")
    return lines


def _layers(of: list[int]) -> str:
    low, high = (value / 2**20 for value in (min(of), max(of)))
    return f"{low:.1f}" if round(low, 1) == round(high, 1) else f"{low:.1f} to {high:.1f}"


if __name__ == "__main__":
    main()
