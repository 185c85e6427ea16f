"""What the greedy cores cost beside the prefill that they save.

    python -m benchmarks.greedy

Each core chooses n / 9 of n tokens of random features, as wide as its method takes them, for one prompt and for eight.
Seconds are those of the one thread that computes; bytes are the most that tensors hold beside the inputs; operations are
counted on paper, and so is the prefill that is saved, of a language model of 7B shapes. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from benchmarks.selection import most_alive, write
from rich.progress import track
from torch import Tensor

from foveate.methods.before_llm.coin import covering
from foveate.methods.before_llm.score import salient_cover
from foveate.methods.in_llm.dart import least_like
from foveate.methods.in_llm.vlm_pruner import outwards, screened
from foveate.ops.cover import greedy_cover
from foveate.ops.dpp import greedy_map
from foveate.ops.farthest import farthest_first

SIZES, BATCHES, SHARE = (576, 2880), (1, 8), 9
ENCODER, LLM = 1024, 4096
CHANNELS, PIVOTS = 256, 4
LAYERS, WIDTH, INNER, TEXT = 32, 4096, 11008, 64
"""LLaMA-7B's, and the text of a prompt."""


@dataclass(frozen=True)
class Core:
    """A greedy choice.

    Attributes:
        methods: who makes it.
        width: of the features.
        work: its operations, in words and for n tokens of which k are chosen.
        run: indices or masks, of features ``[B, n, width]``, weights ``[B, n]`` and k.
    """

    methods: str
    width: int
    words: str
    work: Callable[[int, int], float]
    run: Callable[[Tensor, Tensor, int], Tensor]


def gram(n: int, width: int) -> float:
    return 2.0 * n * n * width


def vlm_pruner(x: Tensor, weight: Tensor, k: int) -> Tensor:
    batch, n, _ = x.shape
    item = torch.zeros(batch, n, dtype=torch.long)
    unit = screened(x, item >= 0, CHANNELS)
    side = round(n**0.5) or 1
    cell = torch.stack([torch.arange(n) // side, torch.arange(n) % side], dim=-1) / (2**0.5 * side)
    pivots = farthest_first(x, PIVOTS, first=x.abs().sum(2).argmax(1), metric="euclidean")
    return outwards(unit, cell.expand(batch, -1, -1).float(), item, pivots, [k] * batch)


def dart(x: Tensor, weight: Tensor, k: int) -> Tensor:
    batch = x.shape[0]
    own = weight.topk(PIVOTS, dim=1).indices
    there = torch.ones(batch, 2 * PIVOTS, dtype=torch.bool)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    length = torch.linalg.vector_norm(x, dim=2)
    return least_like(x, length, valid, own, x[:, :PIVOTS], there, [k] * batch, "ceil")


CORES = (
    Core("scope", ENCODER, "n² d + k n²", lambda n, k: gram(n, ENCODER) + 3.0 * k * n * n, greedy_cover),
    Core("score", ENCODER, "n² d + k n", lambda n, k: gram(n, ENCODER) + 3.0 * k * n, salient_cover),
    Core(
        "divprune, prune2drive",
        LLM,
        "n² d + k n",
        lambda n, k: gram(n, LLM) + 2.0 * k * n,
        lambda x, w, k: farthest_first(x, k),
    ),
    Core(
        "cdpruner", LLM, "n² d + k² n", lambda n, k: gram(n, LLM) + 1.0 * k * k * n, lambda x, w, k: greedy_map(x, w, k)[0]
    ),
    Core("coin", LLM, "n² d + k² n", lambda n, k: gram(n, LLM) + 1.0 * k * k * n, lambda x, w, k: covering(x, w, k, 0.5)),
    Core(
        "vlm_pruner",
        LLM,
        "n d + k n q",
        lambda n, k: (5.0 + 4 * PIVOTS) * n * LLM + 2.0 * k * n * CHANNELS,
        vlm_pruner,
    ),
    Core("dart", LLM, "p n d", lambda n, k: 2.0 * (2 * PIVOTS + 2) * n * LLM, dart),
)


def saved(n: int, k: int) -> float:
    """Operations of the prefill, per prompt, that n - k visual tokens fewer save."""

    def prefill(tokens: int) -> float:
        products = 2.0 * LAYERS * tokens * (4 * WIDTH * WIDTH + 3 * WIDTH * INNER)
        return products + 2.0 * LAYERS * tokens * tokens * WIDTH  # causal: half of both products with all keys

    return prefill(n + TEXT) - prefill(k + TEXT)


def measure(core: Core, n: int, batch: int, rounds: int, seed: int) -> dict[str, Any]:
    """A row of the table."""
    k, times = n // SHARE, []
    for number in range(rounds + 1):
        generator = torch.Generator().manual_seed(seed * 1000 + number)
        x = torch.randn(batch, n, core.width, generator=generator)
        weight = torch.rand(batch, n, generator=generator) + 0.01
        if number == 0:  # warms up, and counts bytes
            peak = most_alive(lambda *of: core.run(*of, k), (x, weight))
            continue
        start = time.thread_time()
        core.run(x, weight, k)
        times.append(time.thread_time() - start)
    work = core.work(n, k)
    return {
        "methods": core.methods,
        "words": core.words,
        "n": n,
        "k": k,
        "batch": batch,
        "seconds": statistics.median(times),
        "bytes": peak,
        "flop": batch * work,
        "of_saved": work / saved(n, k),
    }


def markdown(run: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# What greedy choices cost",
        "",
        f"Written by `{run['command']}`",
        f"({run['machine']}, one CPU thread, float32, torch {run['torch']}, foveate {run['foveate']}).",
        "",
        f"Each core chooses a ninth of n tokens of random features, d wide ({ENCODER} from the encoder, {LLM} in the LLM),",
        f"for one prompt and for eight. q are {CHANNELS} channels that VLM-Pruner looks at, p DART's {2 * PIVOTS} pivots.",
        f"Seconds are medians of {run['rounds']} rounds of the thread that computes, MiB the most that tensors",
        "hold beside the inputs. Operations are counted on paper, as are those of the prefill that is saved: of 7B shapes",
        f"({LAYERS} layers, {WIDTH} and {INNER} wide, {TEXT} tokens of text). Nothing was measured on a GPU.",
        "",
        "| core | work | tokens | prompts | seconds | MiB | GFLOP | of the prefill saved |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        lines.append(
            f"| {r['methods']} | {r['words']} | {r['k']} of {r['n']} | {r['batch']} | {r['seconds']:.3f} "
            f"| {r['bytes'] / 2**20:.0f} | {r['flop'] / 1e9:.1f} | {100 * r['of_saved']:.2f} % |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="docs/greedy", help="path of the results, without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = [(core, n, batch) for core in CORES for n in SIZES for batch in BATCHES]
    with torch.no_grad():
        records = [measure(*each, args.rounds, args.seed) for each in track(plan, description="cores")]
    command = f"python -m benchmarks.greedy --rounds {args.rounds} --seed {args.seed}"
    write(args.out, command, args.rounds, records, markdown)


if __name__ == "__main__":
    main()
