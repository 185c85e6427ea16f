"""How close each method's prefill comes to the physical limit, at LLaVA shapes with random weights.

    python benchmarks/efficiency.py                                              # about a second of prefill on 2 cores
    python benchmarks/efficiency.py --shape 7b --device cuda --dtype bfloat16    # LLaVA-1.5-7B

Each round runs every recipe once and, right after it, the same layers on the rows that the recipe left, with no scoring
and no hooks (the limit); so drift of the machine falls on both alike. Reported are medians over the rounds with 95 %
bootstrap intervals. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import saccade
from saccade.engine import oracle
from saccade.models import anatomy

IMAGE, TEXT = 7, 64
RECIPES = (
    "none",
    "uniform(keep=128)",
    "hiprune(keep=128)",
    "scope(keep=128)",
    "fastv(layer=2, keep=0.22)",
    "shortv({frozen})",
    "snapkv(keep=0.22)",
)
SHAPES: dict[str, dict[str, Any]] = {
    "small": dict(
        text=dict(hidden_size=1024, intermediate_size=2816, num_hidden_layers=8, num_attention_heads=16),
        vision=dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4),
    ),
    "7b": dict(
        text=dict(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32),
        vision=dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16),
    ),
}


@dataclass
class Row:
    """Seconds of one recipe, by round."""

    recipe: str
    visual_tokens: float
    encode: list[float]
    prefill: list[float]
    limit: list[float]
    method: list[float]
    kv_bytes: int


def main() -> None:
    args = _arguments()
    torch.manual_seed(args.seed)
    model = _model(args.shape, args.device, getattr(torch, args.dtype))
    inputs = _inputs(args.device, getattr(torch, args.dtype))
    layers = len(anatomy(model).layers)
    middle = tuple(range(layers * 2 // 5, layers))
    rows = {r: Row(r, 0, [], [], [], [], 0) for r in (text.format(frozen=f"layers={middle}") for text in RECIPES)}
    for number in track(range(args.rounds + 1), description="rounds"):
        for recipe, row in rows.items():
            _measure(model, inputs, recipe, row, keep=number > 0)  # the first round warms up
    _write(args, list(rows.values()))


@torch.no_grad()
def _measure(model: Any, inputs: dict[str, torch.Tensor], recipe: str, row: Row, keep: bool) -> None:
    with saccade.attach(model, recipe) as session:
        model(**inputs, logits_to_keep=1)
    report = session.report
    limit = oracle.timed(oracle.prefill(anatomy(model), report))
    if not keep:
        return
    row.visual_tokens, row.kv_bytes = report.visual_tokens[-1], sum(report.kv_bytes)
    row.encode.append(report.encode_seconds)
    row.prefill.append(report.prefill_seconds)
    row.limit.append(limit)
    row.method.append(report.method_seconds)


def _model(shape: str, device: str, dtype: torch.dtype) -> Any:
    parts = SHAPES[shape]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(image_size=336, patch_size=14, **parts["vision"]),
        text_config=LlamaConfig(vocab_size=1024, **parts["text"]),
        image_token_id=IMAGE,
    )
    with torch.device(device):
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            return LlavaForConditionalGeneration(config).eval()
        finally:
            torch.set_default_dtype(default)


def _inputs(device: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    words = torch.randint(11, 1024, (TEXT,)).tolist()
    ids = torch.tensor([[1, *words[:16], *[IMAGE] * 576, *words[16:]]], device=device)
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 336, 336, device=device, dtype=dtype)}


def _write(args: argparse.Namespace, rows: list[Row]) -> None:
    plain = rows[0]
    records = [
        {
            "recipe": row.recipe,
            "visual_tokens": row.visual_tokens,
            "encode_seconds": statistics.median(row.encode),
            "prefill_seconds": statistics.median(row.prefill),
            "method_seconds": statistics.median(row.method),
            "limit_seconds": statistics.median(row.limit),
            "speedup": _interval([a / b for a, b in zip(plain.prefill, row.prefill)], args.seed),
            "efficiency": _interval([a / b for a, b in zip(row.limit, row.prefill)], args.seed),
            "efficiency_without_method": _interval(
                [a / (b - m) for a, b, m in zip(row.limit, row.prefill, row.method)], args.seed
            ),
            "kv_bytes": row.kv_bytes,
        }
        for row in rows
    ]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    run = {
        "command": f"python benchmarks/efficiency.py --shape {args.shape} --device {args.device} --dtype {args.dtype} "
        f"--rounds {args.rounds} --seed {args.seed}",
        "device": device,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "saccade": saccade.__version__,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"run": run, "records": records}, indent=1) + "\n")
    out.with_suffix(".md").write_text(_markdown(run, records))
    print(out.with_suffix(".md").read_text())


def _markdown(run: dict[str, str], records: list[dict[str, Any]]) -> str:
    lines = [
        "# Efficiency against the physical limit",
        "",
        "Written by `" + run["command"] + "`",
        f"({run['device']}, {run['machine']}, torch {run['torch']}, transformers {run['transformers']}).",
        "",
        "Seconds of the language model's prefill (medians); *limit* is the same layers on the surviving rows, no scoring,",
        "no hooks. Efficiency is limit / prefill with a 95 % interval, in the last column with the method's own arithmetic",
        "set aside. The encoder is listed apart; its column includes the scores that a method reads there.",
        "",
        "| recipe | tokens | encode s | prefill s | method s | limit s | speed-up | efficiency | no method | KV MiB |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        speed, eff, pure = (
            "{:.2f} [{:.2f}, {:.2f}]".format(*r[key]) for key in ("speedup", "efficiency", "efficiency_without_method")
        )
        lines.append(
            f"| `{r['recipe']}` | {r['visual_tokens']:g} | {r['encode_seconds']:.3f} | {r['prefill_seconds']:.3f} "
            f"| {r['method_seconds']:.4f} | {r['limit_seconds']:.3f} | {speed} | {eff} | {pure} "
            f"| {r['kv_bytes'] / 2**20:.1f} |"
        )
    return "\n".join(lines) + "\n"


def _interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), medians[25], medians[974]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="docs/efficiency", help="path of the results, without suffix")
    return parser.parse_args()


if __name__ == "__main__":
    main()
