"""How close each method comes to the physical limit, at LLaVA shapes with random weights.

    python benchmarks/efficiency.py                                              # about ten minutes on 2 cores
    python benchmarks/efficiency.py --images 4 --stages unmodified "in the cache" --rounds 1 --decode-rounds 1 \\
        --out docs/efficiency-long                                               # a cache that decoding feels
    python benchmarks/efficiency.py --shape 7b --device cuda --dtype bfloat16    # LLaVA-1.5-7B

Each round runs every recipe once and, right after it, the same layers on the rows (over the cache entries) that the recipe
left, with no scoring and no hooks: the limit. So drift of the machine falls on both alike. Reported are medians over the
rounds with 95 % bootstrap intervals. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.progress import track
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import foveate
from foveate.core.artifact import Artifact
from foveate.core.errors import FoveateError
from foveate.engine import limit
from foveate.methods import ALVTS, IndexPreserving
from foveate.methods.before_encoder.index_preserving import cell_logits
from foveate.models import Anatomy, anatomy

IMAGE, TEXT, PATCHES = 7, 64, 576
SHARE, KEEP = 0.22, 128
STAGES: dict[str, tuple[str, ...]] = {
    "unmodified": ("none",),
    "before the encoder": ("index_preserving(kernel=1)",),
    "in the encoder": (f"tome(keep={KEEP})", f"folder(keep={KEEP})"),
    "before the language model": (
        f"uniform(keep={KEEP})",
        f"hiprune(keep={KEEP})",
        f"scope(keep={KEEP})",
        f"cdpruner(keep={KEEP}, relevance='embedding')",
        f"prumerge(keep={KEEP}, plus=True)",
        f"ppe(keep={SHARE})",
    ),
    "in the language model": (
        f"fastv(layer=2, keep={SHARE})",
        "feather",
        "v2drop",
        "hidrop",
        "transprune",
        "ivc_prune",
        "shortv(layers={late})",
        f"alvts(keep={SHARE})",
    ),
    "in the cache": (
        f"snapkv(keep={SHARE})",
        f"mixkv(keep={SHARE})",
        f"mixkv(keep={SHARE}, host='adakv')",
        f"prefixkv(keep={SHARE})",
        "sparsevila",
    ),
    "composed": ("hiprune(keep=288) + fastv(layer=2, keep=0.5) + snapkv(keep=0.5)",),
}
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
    """What one recipe cost, by round; ``decode`` in seconds per token."""

    stage: str
    recipe: str
    visual_tokens: float = 0
    kv_bytes: int = 0
    kv_bytes_at_end: int = 0
    encode: list[float] = field(default_factory=list)
    prefill: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    method: list[float] = field(default_factory=list)
    decode: list[float] = field(default_factory=list)
    decode_limit: list[float] = field(default_factory=list)


def main() -> None:
    args = _arguments()
    torch.manual_seed(args.seed)
    model = build(args.shape, args.device, getattr(torch, args.dtype))
    inputs = prompt(args.images, args.device, getattr(torch, args.dtype))
    parts = anatomy(model)
    bench = Bench(model, parts, inputs, _artifacts(parts, inputs))
    rows = [row for row in _rows(len(parts.layers), args.stages) if bench.hosts(row.recipe)]
    for number in track(range(args.rounds + 1), description="rounds"):
        for row in rows:  # the first round warms up
            bench.measure(row, args.tokens if 0 < number <= args.decode_rounds else 2, keep=number > 0)
    _write(args, rows)


def _rows(layers: int, stages: Iterable[str]) -> Iterator[Row]:
    late = tuple(range(layers * 2 // 5, layers))
    for stage, recipes in ((stage, STAGES[stage]) for stage in stages):
        for recipe in recipes:
            yield Row(stage, recipe.format(late=late))


@dataclass
class Bench:
    """A model, a prompt and random artifacts."""

    model: Any
    parts: Anatomy
    inputs: dict[str, Tensor]
    artifacts: list[Artifact]

    def hosts(self, recipe: str) -> bool:
        """Whether the recipe can run here; says why not."""
        try:
            foveate.attach(self.model, recipe, artifacts=self.artifacts).detach()
        except FoveateError as error:
            print(f"skipped: {error}")
            return False
        return True

    @torch.no_grad()
    def measure(self, row: Row, tokens: int, keep: bool) -> None:
        """One request of ``tokens`` generated tokens, then its limits; two tokens only warm up."""
        with foveate.attach(self.model, row.recipe, artifacts=self.artifacts) as session:
            cache = self.model(**self.inputs, logits_to_keep=1).past_key_values
            prompt, before = session.report, limit.held(cache)
            token = self.inputs["input_ids"][:, -1:]
            for _ in range(tokens):
                self.model(input_ids=token, past_key_values=cache)
            end, after = session.report, limit.held(cache)
        prefill_limit = limit.timed(limit.prefill(self.parts, prompt))
        # A cache that evicts as it grows holds on average what this one holds, growing by one a token.
        entries = [(first + last - tokens) / 2 for first, last in zip(before, after)]
        decode_limit = limit.timed(limit.decode(self.parts, 1, entries, tokens)) / tokens
        if not keep:
            return
        row.visual_tokens, row.kv_bytes = prompt.visual_tokens[-1], sum(prompt.kv_bytes)
        row.encode.append(prompt.encode_seconds)
        row.prefill.append(prompt.prefill_seconds)
        row.limit.append(prefill_limit)
        row.method.append(prompt.method_seconds)
        if tokens > 2:
            row.kv_bytes_at_end = sum(end.kv_bytes)
            row.decode.append(end.decode_seconds / tokens)
            row.decode_limit.append(decode_limit)


def build(shape: str, device: str, dtype: torch.dtype) -> Any:
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


def prompt(images: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    words = torch.randint(11, 1024, (TEXT,)).tolist()
    ids = torch.tensor([[1, *words[:16], *[IMAGE] * PATCHES * images, *words[16:]]], device=device)
    return {"input_ids": ids, "pixel_values": torch.randn(images, 3, 336, 336, device=device, dtype=dtype)}


def _artifacts(parts: Anatomy, inputs: dict[str, Tensor]) -> list[Artifact]:
    """Random numbers of the right shapes for methods that cannot run without theirs."""
    fingerprint = parts.traits().fingerprint
    classifier = _classifier(parts, inputs["pixel_values"])
    return [
        ALVTS().artifact(fingerprint, _selectors(parts)),
        Artifact(IndexPreserving.name, fingerprint, classifier),
    ]


def _selectors(parts: Anatomy) -> dict[str, Any]:
    layers, width = len(parts.layers), parts.config.hidden_size
    rank, head = width // 16, width // parts.config.num_attention_heads
    inner, outer = torch.randn(layers, rank, width) / width, torch.randn(layers, width, rank) / rank
    return {"query_in": inner, "query_out": outer, "key_in": inner, "key_out": outer, "head_width": head}


def _classifier(parts: Anatomy, pixels: Tensor, features: int = 256) -> dict[str, Any]:
    """A random classifier, biased so that it takes the same share for foreground as other methods keep."""
    assert parts.encoder is not None
    assert parts.encoder.patches is not None
    cells = parts.encoder.patches.read((), {"pixel_values": pixels}).flatten(1)
    size = cells.shape[1]
    weights = {
        "norm_weight": torch.ones(size),
        "norm_bias": torch.zeros(size),
        "hidden_weight": torch.randn(features, size) / size**0.5,
        "hidden_bias": torch.zeros(features),
        "head_weight": torch.randn(1, features) / features**0.5,
        "head_bias": torch.zeros(1),
    }
    logits = cell_logits(cells.cpu(), weights)
    best = logits.topk(KEEP + 1).values
    return weights | {"head_bias": -best[-2:].mean()[None], "cell": list(parts.encoder.patches.cell)}


def _write(args: argparse.Namespace, rows: list[Row]) -> None:
    records = [_record(row, rows[0], args.seed) for row in rows]
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    run = {
        "command": f"python benchmarks/efficiency.py --shape {args.shape} --device {args.device} --dtype {args.dtype} "
        f"--images {args.images} --stages {' '.join(map(repr, args.stages))} "
        f"--rounds {args.rounds} --decode-rounds {args.decode_rounds} --tokens {args.tokens} --seed {args.seed}",
        "visual": PATCHES * args.images,
        "device": device,
        "machine": platform.machine(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "foveate": foveate.__version__,
        "tokens": args.tokens,
    }
    out = Path(args.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".json").write_text(json.dumps({"run": run, "records": records}, indent=1) + "\n")
    out.with_suffix(".md").write_text(_markdown(run, records))
    print(out.with_suffix(".md").read_text())


def _record(row: Row, plain: Row, seed: int) -> dict[str, Any]:
    def ratio(over: list[float], under: list[float]) -> tuple[float, float, float]:
        return _interval([a / b for a, b in zip(over, under)], seed)

    bare = [prefill - method for prefill, method in zip(row.prefill, row.method)]
    return {
        "stage": row.stage,
        "recipe": row.recipe,
        "visual_tokens": row.visual_tokens,
        "encode_seconds": statistics.median(row.encode),
        "encode_speedup": ratio(plain.encode, row.encode),
        "prefill_seconds": statistics.median(row.prefill),
        "method_seconds": statistics.median(row.method),
        "limit_seconds": statistics.median(row.limit),
        "speedup": ratio(plain.prefill, row.prefill),
        "efficiency": ratio(row.limit, row.prefill),
        "efficiency_without_method": ratio(row.limit, bare),
        "decode_seconds": statistics.median(row.decode),
        "decode_limit_seconds": statistics.median(row.decode_limit),
        "decode_speedup": ratio(plain.decode, row.decode),
        "decode_efficiency": ratio(row.decode_limit, row.decode),
        "kv_bytes": row.kv_bytes,
        "kv_bytes_at_end": row.kv_bytes_at_end,
    }


def _markdown(run: dict[str, Any], records: list[dict[str, Any]]) -> str:
    lines = [
        "# Efficiency against the physical limit",
        "",
        f"Written by `{run['command']}`",
        f"({run['device']}, {run['machine']}, torch {run['torch']}, transformers {run['transformers']}).",
        "",
        f"A prompt of {TEXT + 1 + run['visual']} tokens, {run['visual']} of them visual. Seconds are medians; ratios are",
        "medians with 95 % intervals. *Limit* is the same layers on the rows that live (while decoding: over a plain cache",
        "of as many entries as the recipe's attention reads), no scoring, no hooks; efficiency is limit / measured, also",
        "with the method's own arithmetic set aside. The encoder is listed apart, the scores that a method reads there",
        "included; it has no limit, only a speed-up. Decoding is per token, the mean over",
        f"{run['tokens']} tokens behind the prompt; the KV cache is given after the prompt and at the end. `alvts` and",
        "`index_preserving` run on random numbers.",
    ]
    for stage in dict.fromkeys(record["stage"] for record in records):
        mine = [record for record in records if record["stage"] == stage]
        lines += ["", f"## {stage[0].upper()}{stage[1:]}", "", *_prompt_table(mine), "", *_decode_table(mine)]
    return "\n".join(lines) + "\n"


def _prompt_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| recipe | tokens | encode s | speed-up | prefill s | limit s | speed-up | efficiency | without method |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| `{r['recipe']}` | {r['visual_tokens']:g} | {r['encode_seconds']:.3f} | {_ratio(r['encode_speedup'])} "
            f"| {r['prefill_seconds']:.3f} | {r['limit_seconds']:.3f} | {_ratio(r['speedup'])} | {_ratio(r['efficiency'])} "
            f"| {_ratio(r['efficiency_without_method'])} |"
        )
    return lines


def _decode_table(records: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| recipe | KV MiB | at the end | ms a token | limit ms | speed-up | efficiency |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| `{r['recipe']}` | {r['kv_bytes'] / 2**20:.1f} | {r['kv_bytes_at_end'] / 2**20:.1f} "
            f"| {1e3 * r['decode_seconds']:.2f} | {1e3 * r['decode_limit_seconds']:.2f} | {_ratio(r['decode_speedup'])} "
            f"| {_ratio(r['decode_efficiency'])} |"
        )
    return lines


def _ratio(interval: tuple[float, float, float]) -> str:
    return "{:.2f} [{:.2f}, {:.2f}]".format(*interval)


def _interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), medians[25], medians[974]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--images", type=int, default=1, help="images in the prompt, 576 tokens each")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--decode-rounds", type=int, default=2, help="rounds that decode at length")
    parser.add_argument("--tokens", type=int, default=128, help="tokens to decode")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="docs/efficiency", help="path of the results, without suffix")
    return parser.parse_args()


if __name__ == "__main__":
    main()
