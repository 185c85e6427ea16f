"""How long each method's own arithmetic takes beside its published formula, and whether both choose alike.

    python benchmarks/selection.py                                # about five minutes on one core

The formulas are written down here once more as the papers and their code state them, plainly, in torch. Each round draws
new inputs and runs both on them, one right after the other and in turn first, so drift of the machine falls on both alike.
Seconds are those of the one thread that computes, so that what else the machine does counts little. Memory is measured
apart: the most bytes of tensors that were alive beside the inputs. Writes <out>.json and <out>.md.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import avg_pool1d, normalize, pad, scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import foveate
from foveate.methods.before_llm.cdpruner import EPSILON, likeness, scaled
from foveate.methods.before_llm.hiprune import hierarchical
from foveate.methods.before_llm.ppe import cluster_tokens
from foveate.methods.before_llm.prumerge import cls_attention, full_width, merging, outliers, published_grid
from foveate.methods.in_encoder.folder import folded
from foveate.methods.kv_cache.entries import best_entries
from foveate.methods.kv_cache.snapkv import window_scores
from foveate.ops.attention import columns, row_logits
from foveate.ops.cover import greedy_cover
from foveate.ops.dpp import greedy_map
from foveate.ops.matching import averaging, bipartite
from foveate.ops.means import means
from foveate.ops.select import top_k, top_rows

HEADS, HEAD, WIDTH = 16, 64, 1024
"""Of CLIP-L, the encoder of LLaVA-1.5."""
COLUMNS = 24
TILE = COLUMNS**2
TILES = 5 * TILE
"""Tokens of a picture in five tiles, ranked as one."""
CLS = 1

Function = Callable[..., Tensor]


@dataclass
class Case:
    """A comparison: what is drawn, and two functions of it.

    Attributes:
        name, size: what the table calls it.
        draw: inputs, given a generator.
        ours, published: indices ``[..., k]`` of what is kept, or rows ``[..., k, D]`` that are made.
        seconds: of each pair of runs, ours and the published one.
        same: shares of the published indices (rows, to 1e-4 of the largest number) that ours has too.
        peak: most bytes alive beside the inputs, ours and the published one's.
    """

    name: str
    size: str
    draw: Callable[[torch.Generator], tuple[Tensor, ...]]
    ours: Function
    published: Function
    seconds: list[tuple[float, float]] = field(default_factory=list)
    same: list[float] = field(default_factory=list)
    peak: tuple[int, int] = (0, 0)

    def measure(self, seed: int, number: int, keep: bool) -> None:
        """One round."""
        inputs = self.draw(torch.Generator().manual_seed(seed * 1000 + number))
        found: dict[Function, tuple[float, Tensor]] = {}
        for function in (self.ours, self.published) if number % 2 else (self.published, self.ours):
            start = time.thread_time()
            made = function(*inputs)
            found[function] = time.thread_time() - start, made
        if not keep:
            self.peak = most_alive(self.ours, inputs), most_alive(self.published, inputs)
            return
        (ours, mine), (published, theirs) = found[self.ours], found[self.published]
        self.seconds.append((ours, published))
        self.same.append(agreement(mine, theirs))


def tokens(generator: torch.Generator, count: int, width: int) -> Tensor:
    """``[1, count, width]`` features that come in groups, as those of a picture do."""
    groups = torch.randn(40, width, generator=generator)
    group = torch.randint(len(groups), (count,), generator=generator)
    return (groups[group] + 0.7 * torch.randn(count, width, generator=generator))[None]


def heads(generator: torch.Generator, count: int, rows: int, width: int) -> Tensor:
    """``[1, count, rows, width]`` queries or keys."""
    return torch.randn(1, count, rows, width, generator=generator)


# SCOPE


def draw_scope(generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
    return tokens(generator, count, WIDTH), torch.randn(1, count, generator=generator).softmax(1)


def published_scope(features: Tensor, saliency: Tensor, k: int) -> Tensor:
    unit = normalize(features[0], dim=-1)
    similarity = unit @ unit.T
    covered, order = torch.zeros(len(unit)), list[int]()
    for _ in range(k):
        gain = (similarity - covered).clamp(min=0).sum(1)
        score = gain * saliency[0]
        score[order] = float("-inf")
        order.append(int(score.argmax()))
        covered = torch.maximum(covered, similarity[order[-1]])
    return torch.tensor(order)[None]


# HiPrune


def draw_hiprune(generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(heads(generator, HEADS, CLS + TILE, HEAD) for _ in range(4))


def our_hiprune(query: Tensor, key: Tensor, last_query: Tensor, last_key: Tensor, k: int) -> Tensor:
    middle, output = (columns(q, of, HEAD**-0.5)[:, CLS:] for q, of in ((query, key), (last_query, last_key)))
    return hierarchical(middle, output, COLUMNS, k)


def published_hiprune(query: Tensor, key: Tensor, last_query: Tensor, last_key: Tensor, k: int) -> Tensor:
    middle, output = (
        (q @ of.mT * HEAD**-0.5).softmax(-1).mean(1).mean(1)[0, CLS:] for q, of in ((query, key), (last_query, last_key))
    )
    anchors = middle.topk(round(0.1 * k / 5)).indices
    cross = torch.cat([anchors + step for step in (0, -1, 1, -COLUMNS, COLUMNS)])
    first = cross[(cross >= 0) & (cross < TILE)].unique()
    output[first] = float("-inf")
    return torch.cat([first, output.topk(k - len(first)).indices]).sort().values[None]


# FOLDER and ToMe


def draw_merge(generator: torch.Generator) -> tuple[Tensor, ...]:
    keys = tokens(generator, CLS + TILE, HEADS * HEAD).reshape(1, CLS + TILE, HEADS, HEAD).transpose(1, 2)
    return tokens(generator, CLS + TILE, WIDTH), keys, torch.randn(1, CLS + TILE, generator=generator).softmax(1)


def our_folder(x: Tensor, keys: Tensor, attention: Tensor, k: int) -> Tensor:
    size = torch.ones(x.shape[:2])
    into = folded(keys.mean(1), size, [TILE - k], [CLS + TILE], protected=CLS, attention=attention)
    return averaging(*into, size).apply(x)


def published_folder(x: Tensor, keys: Tensor, attention: Tensor, k: int) -> Tensor:
    x, metric, attention = x[0], keys[0].mean(0), attention[0]
    size, remove = torch.ones(len(x)), TILE - k
    while remove > 0:
        r = min((len(x) - 1) // 2, remove)
        score = match_scores(metric) - 500 * attention[::2, None]
        score[0] = float("-inf")  # CLS stays
        moved, stays, partner = best_pairs(score, r)
        total = join(size, moved, stays, partner)
        x = join(x * size[:, None], moved, stays, partner) / total[:, None]
        metric = join(metric * size[:, None], moved, stays, partner) / total[:, None]
        count = join(torch.ones_like(size), moved, stays, partner)
        attention, size = join(attention, moved, stays, partner) / count, total
        remove -= r
    return x[None]


def our_tome(x: Tensor, keys: Tensor, attention: Tensor, r: int) -> Tensor:
    return averaging(*bipartite(keys.mean(1), [r], [CLS + TILE], protected=CLS), torch.ones(x.shape[:2])).apply(x)


def published_tome(x: Tensor, keys: Tensor, attention: Tensor, r: int) -> Tensor:
    score = match_scores(keys[0].mean(0))
    score[0] = float("-inf")
    pairs = best_pairs(score, r)
    return (join(x[0], *pairs) / join(torch.ones(len(x[0])), *pairs)[:, None])[None]


def match_scores(metric: Tensor) -> Tensor:
    """Cosines of even and odd rows."""
    unit = normalize(metric, dim=-1)
    return unit[::2] @ unit[1::2].T


def best_pairs(score: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    """Even rows that move, those that stay (in order), and the odd rows that the former join."""
    best, partner = score.max(1)
    order = best.argsort(descending=True)
    return order[:r], order[r:].sort().values, partner[order[:r]]


def join(rows: Tensor, moved: Tensor, stays: Tensor, partner: Tensor) -> Tensor:
    """Sums of the rows that met: surviving even rows, then odd ones."""
    even, odd = rows[::2], rows[1::2].clone()
    return torch.cat([even[stays], odd.index_add_(0, partner, even[moved])])


# PruMerge


def draw_prumerge(generator: torch.Generator) -> tuple[Tensor, ...]:
    key = tokens(generator, CLS + TILE, HEADS * HEAD).reshape(1, CLS + TILE, HEADS, HEAD).transpose(1, 2)
    return tokens(generator, TILE, WIDTH), heads(generator, HEADS, CLS + TILE, HEAD), key


def our_prumerge(x: Tensor, query: Tensor, key: Tensor, plus: bool) -> Tensor:
    key = full_width(key)
    valid = torch.ones(x.shape[:2], dtype=torch.bool)
    attention = cls_attention(full_width(query), key, CLS)
    place = torch.arange(TILE)[None]
    rank = torch.zeros_like(place).scatter(1, top_k(attention, TILE), place)
    tops = outliers(attention, valid).clamp(min=1)
    top = rank < tops[:, None]
    kept = top | published_grid(valid, tops) if plus else top
    count = int(kept.sum()) + 1
    return merging(attention, key[:, CLS:], torch.where(top, rank, TILE + place), kept, valid, [count]).apply(x)


def published_prumerge(x: Tensor, query: Tensor, key: Tensor, plus: bool) -> Tensor:
    x, query, key = x[0], full_width(query)[0], full_width(key)[0]
    attention = (query[0] @ key.T * len(query[0]) ** -0.5).softmax(0)[CLS:]
    first, third = attention.quantile(torch.tensor([0.25, 0.75]))
    count = int((attention > third + 1.5 * (third - first)).sum())
    kept = attention.topk(count).indices.tolist()
    if plus:
        kept += [place for place in range(0, TILE - 1, max(TILE // count // 3, 1)) if place not in kept]
    key, made = key[CLS:], []
    for token in kept:
        others = [place for place in range(TILE) if place != token]
        cosine = normalize(key[others], dim=1) @ normalize(key[token], dim=0)
        near = torch.tensor(others)[cosine.topk(32).indices]
        made.append(x[token] + (attention[near, None] * x[near]).sum(0))
    rest = [place for place in range(TILE) if place not in kept]
    return torch.stack([*made, (attention[rest, None] * x[rest]).sum(0)])[None]


# PPE


def our_ppe(x: Tensor, count: int) -> Tensor:
    centres, cluster = cluster_tokens(x, count, 5)
    owner, place = centres.gather(1, cluster), torch.full(x.shape[:2], -1)
    place[0, centres[0]] = torch.arange(count)
    return means(owner, place, (count,)).apply(x)


def published_ppe(x: Tensor, count: int) -> Tensor:
    x = x[0]
    distance = torch.cdist(x, x) / x.shape[1] ** 0.5
    density = (-distance.topk(5, largest=False).values.square().mean(1)).exp()
    denser = density[None] > density[:, None]
    gap = torch.where(denser, distance, distance.max()).min(1).values
    centres = (gap * density).topk(count).indices
    cluster = distance[centres].argmin(0)
    cluster[centres] = torch.arange(count)
    member = torch.nn.functional.one_hot(cluster, count).to(x.dtype)
    return (member.T @ x / member.sum(0)[:, None])[None]


# CDPruner


def draw_cdpruner(generator: torch.Generator, count: int) -> tuple[Tensor, ...]:
    sides = (torch.randn(*shape, 768, generator=generator) for shape in ((1, count), (1,)))
    return tokens(generator, count, 4096), *sides


def our_cdpruner(x: Tensor, patches: Tensor, text: Tensor, k: int) -> Tensor:
    return greedy_map(x, scaled(-likeness(patches, [text]), EPSILON), k)[0]


def published_cdpruner(x: Tensor, patches: Tensor, text: Tensor, k: int) -> Tensor:
    unit = x / x.norm(dim=-1, keepdim=True)
    similarity = unit @ unit.mT
    cosine = normalize(patches, dim=-1) @ normalize(text, dim=-1).T
    relevance = -cosine.mean(-1)
    relevance = (relevance - relevance.min() + 1e-6) / (relevance.max() - relevance.min())
    kernel = relevance[:, :, None] * similarity * relevance[:, None]
    left, basis, order = kernel[0].diagonal().clone(), torch.zeros(k, x.shape[1]), list[int]()
    for step in range(k):
        best = int(left.argmax())
        row = (kernel[0, best] - basis[:step, best] @ basis[:step]) / left[best].sqrt()
        basis[step] = row
        left -= row.square()
        left[best] = float("-inf")
        order.append(best)
    return torch.tensor(order)[None]


# FastV: with the attention of the layer that the scores are read in, which the published code makes as one map


def draw_fastv(generator: torch.Generator) -> tuple[Tensor, ...]:
    return tuple(heads(generator, 32, TILE + 64, 128) for _ in range(3))


def our_fastv(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    scaled_dot_product_attention(query, key, value, is_causal=True)
    scores = row_logits(query[:, :, -1:], key, 128**-0.5).softmax(-1)[:, :, 0].mean(1)
    visual = torch.zeros_like(scores, dtype=torch.bool)
    visual[:, 35 : 35 + TILE] = True
    return top_rows(scores, visual, [k]).nonzero()[:, 1][None]


def published_fastv(query: Tensor, key: Tensor, value: Tensor, k: int) -> Tensor:
    future = torch.full((query.shape[2], query.shape[2]), float("-inf")).triu(1)
    attention = (query @ key.mT * 128**-0.5 + future).softmax(-1)
    _ = attention @ value
    scores = attention.mean(1)[0, -1, 35 : 35 + TILE]
    return (scores.topk(k).indices + 35).sort().values[None]


# SnapKV, and the choice alone


def draw_snapkv(generator: torch.Generator, rows: int, window: int = 64) -> tuple[Tensor, ...]:
    logits = torch.randn(1, 32, window, rows, generator=generator)
    ahead = torch.arange(rows) > torch.arange(rows - window, rows)[:, None]
    return (logits.masked_fill(ahead, float("-inf")).softmax(-1),)


def our_snapkv(attention: Tensor, k: int) -> Tensor:
    rows = attention.shape[3]
    window = (torch.arange(rows) >= rows - attention.shape[2])[None]
    return best_entries(window_scores(attention, window, 8, 5), torch.ones_like(window), [k])


def published_snapkv(attention: Tensor, k: int) -> Tensor:
    window, rows = attention.shape[2:]
    mean = attention[..., : rows - window].mean(2)
    pooled = avg_pool1d(mean, 5, stride=1, padding=2).reshape(1, 8, 4, -1).mean(2)
    return pad(pooled, (0, window), value=pooled.max().item()).topk(k).indices


def draw_scores(generator: torch.Generator, rows: int, count: int) -> tuple[Tensor, ...]:
    return (torch.randn(1, rows, count, generator=generator),)


def published_top_k(scores: Tensor, k: int) -> Tensor:
    return scores.topk(k).indices


def cases() -> list[Case]:
    """All comparisons."""
    found = []

    def add(name: str, size: str, draw: Any, ours: Function, published: Function, *by: Any) -> None:
        found.append(Case(name, size, draw, lambda *of: ours(*of, *by), lambda *of: published(*of, *by)))

    for count, k in ((TILE, 64), (TILE, 192), (TILES, 160)):
        add("SCOPE", f"{k} of {count}", lambda g, n=count: draw_scope(g, n), greedy_cover, published_scope, k)
    add("HiPrune", f"128 of {TILE}", draw_hiprune, our_hiprune, published_hiprune, 128)
    for k in (64, 192):
        add("FOLDER", f"{k} of {TILE}", draw_merge, our_folder, published_folder, k)
    add("ToMe", f"a block, {TILE} to {TILE - 72}", draw_merge, our_tome, published_tome, 72)
    add("PruMerge", f"outliers of {TILE}", draw_prumerge, our_prumerge, published_prumerge, False)
    add("PruMerge+", f"and a grid of {TILE}", draw_prumerge, our_prumerge, published_prumerge, True)
    add("PPE", f"260 of {TILE}", lambda g: (tokens(g, TILE, 3584),), our_ppe, published_ppe, 260)
    for count, k in ((TILE, 64), (TILE, 192), (TILES, 160), (TILES, 640)):
        add("CDPruner", f"{k} of {count}", lambda g, n=count: draw_cdpruner(g, n), our_cdpruner, published_cdpruner, k)
    add("FastV", f"a layer, 128 of {TILE}", draw_fastv, our_fastv, published_fastv, 128)
    for rows in (1024, 8192):
        add("SnapKV", f"a quarter of {rows}", lambda g, n=rows: draw_snapkv(g, n), our_snapkv, published_snapkv, rows // 4)
    for rows, count in ((1, TILE), (8, 2048), (8, 32768)):
        size = f"a quarter of {rows} x {count}"
        add(
            "top_k", size, lambda g, r=rows, n=count: draw_scores(g, r, n), top_k, lambda s, k: s.topk(k).indices, count // 4
        )
    return found


def agreement(ours: Tensor, published: Tensor) -> float:
    """Share of the published indices that are among ours, or of rows that are the same."""
    if published.is_floating_point():
        if ours.shape != published.shape:
            return 0.0
        return ((ours - published).abs().amax(-1) <= 1e-4 * published.abs().max()).float().mean().item()
    ours, published = ours.flatten(0, -2), published.flatten(0, -2)
    return statistics.fmean(torch.isin(theirs, mine).float().mean().item() for mine, theirs in zip(ours, published))


class Alive(TorchDispatchMode):
    """Counts the bytes of tensors that were made and are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.total = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {id(tensor.untyped_storage()) for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._known | given:
                self._known.add(id(storage))
                self.total += storage.nbytes()
                self.peak = max(self.peak, self.total)
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.total -= size


def most_alive(function: Function, inputs: tuple[Tensor, ...]) -> int:
    """The most bytes that ``function`` holds."""
    with Alive() as alive:
        function(*inputs)
    return alive.peak


def interval(values: list[float], seed: int) -> tuple[float, float, float]:
    """Median and its 95 % bootstrap interval."""
    draw = random.Random(seed)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(1000))
    return statistics.median(values), medians[25], medians[974]


def record(case: Case, seed: int) -> dict[str, Any]:
    """What the table says of a comparison."""
    return {
        "name": case.name,
        "size": case.size,
        "seconds": statistics.median(ours for ours, _ in case.seconds),
        "published_seconds": statistics.median(published for _, published in case.seconds),
        "ratio": interval([ours / published for ours, published in case.seconds], seed),
        "bytes": case.peak[0],
        "published_bytes": case.peak[1],
        "same": statistics.fmean(case.same),
    }


def markdown(run: dict[str, Any], records: list[dict[str, Any]]) -> str:
    """The page."""
    lines = [
        "# Selection beside the published formulas",
        "",
        f"Written by `{run['command']}`",
        f"({run['machine']}, one CPU thread, float32, torch {run['torch']}, foveate {run['foveate']}).",
        "",
        "Each method's own arithmetic against its published formula, which the command states plainly in torch, on the same",
        "random inputs, at the sizes of LLaVA-1.5 (576 tokens) and of five tiles ranked as one (2,880). Milliseconds of the",
        f"thread that computes are medians of {run['rounds']} paired rounds; the ratio is ours over the published one, a",
        "median with its 95 % interval, below 1 where ours is faster. MiB are the most that tensors hold beside the inputs.",
        "*Same* is the share of what the formula keeps (of the rows that it makes, to 1e-4 of the largest number) that ours",
        "has too: PPE's densities are compared as logarithms, which may round another way. HiPrune and FastV start from",
        "queries and keys, FastV with the attention of the layer itself. Ours orders equals by index, `torch.topk` leaves",
        "them open.",
        "",
        "| method | keeps | ms | published | ratio | MiB | published | same |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        ratio = "{:.2f} [{:.2f}, {:.2f}]".format(*r["ratio"])
        ours, theirs = (r[name] / 2**20 for name in ("bytes", "published_bytes"))
        lines.append(
            f"| {r['name']} | {r['size']} | {1e3 * r['seconds']:.2f} | {1e3 * r['published_seconds']:.2f} | {ratio} "
            f"| {ours:.1f} | {theirs:.1f} | {100 * r['same']:.4g} % |"
        )
    return "\n".join(lines) + "\n"


Page = Callable[[dict[str, Any], list[dict[str, Any]]], str]


def write(out: str, command: str, rounds: int, records: list[dict[str, Any]], page: Page) -> None:
    """<out>.json, and the page that is made of it, which is shown."""
    run = {
        "command": command,
        "machine": platform.machine(),
        "rounds": rounds,
        "torch": torch.__version__,
        "foveate": foveate.__version__,
    }
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps({"run": run, "records": records}, indent=1) + "\n")
    path.with_suffix(".md").write_text(page(run, records))
    print(path.with_suffix(".md").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="docs/selection", help="path of the results, without suffix")
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = cases()
    with torch.no_grad():
        for number in track(range(args.rounds + 1), description="rounds"):
            for case in found:  # the first round warms up, and counts bytes
                case.measure(args.seed, number, keep=number > 0)
    command = f"python benchmarks/selection.py --rounds {args.rounds} --seed {args.seed}"
    write(args.out, command, args.rounds, [record(case, args.seed) for case in found], markdown)


if __name__ == "__main__":
    main()
