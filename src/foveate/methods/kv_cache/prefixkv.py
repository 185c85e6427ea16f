"""PrefixKV: every layer keeps the entries that hold the same share of its attention, so that layers keep different numbers.

The prefix is that of a layer's entries sorted by importance, not of the prompt. Paper: "PrefixKV: Adaptive Prefix KV Cache
is What Vision Instruction-Following Models Need for Efficient Generation", arXiv 2412.03409. Differs from the released code:
``keep`` is the share that stays (there: that goes); the search is exact and meets the budget to the entry (``"bisect"`` is
the released one: it stops within 5 entries, and rounds in favour of the cache); each sample of a batch has numbers of its
own (there: those of the first). ``search="offline"`` reads the mean profile of calibration samples, stored for nine budgets
and interpolated between them (`foveate calibrate prefixkv`). Importance is exact where attention is causal.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept, Offline
from foveate.core.model_call import ModelCall
from foveate.core.parameters import AtLeast, Keep
from foveate.core.ranking import ranked
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Columns, Numbers, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.select import top_rows

SHARES = tuple(step / 10 for step in range(1, 10))
"""Budgets of the offline profile."""


def importance(column_means: Tensor, valid: Tensor) -> Tensor:
    """Attention received by each entry, summed over queries: ``[B, n]`` from means over the queries that see it."""
    seen_by = valid.flip(1).cumsum(1).flip(1)
    return column_means.float() * seen_by * valid


def priority(scores: Tensor) -> Tensor:
    """Cumulative share of importance of the best entries: ``[..., n]``, rising to 1."""
    ordered = scores.sort(dim=-1, descending=True).values
    return (ordered / ordered.sum(-1, keepdim=True)).cumsum(-1)


def exact_counts(scores: Tensor, live: Tensor, budget: Tensor, protect: int) -> Tensor:
    """Entries that each layer keeps: the threshold of `priority` that all layers share is where the budget is used up.

    Args:
        scores: ``[L, B, n]`` importance, 0 at padding.
        live: ``[L, B]`` entries that are no padding.
        budget: ``[B]`` entries of all layers together.
        protect: entries that stay in each layer come what may.

    Returns:
        ``[L, B]`` with the sum ``budget`` where the protected entries leave that much.
    """
    layers, batch, entries = scores.shape
    # The o-th entry of a layer is kept at thresholds above the share of the o - 1 before it: the K smallest of these stay.
    threshold = torch.nn.functional.pad(priority(scores)[..., :-1], (1, 0))
    spare = torch.arange(entries, device=scores.device) >= (live - protect)[..., None]
    order = threshold.masked_fill(spare, float("inf")).transpose(0, 1).flatten(1).sort(dim=1, stable=True).indices
    fixed = live.clamp(max=protect)
    kept = torch.arange(layers * entries, device=scores.device) < (budget - fixed.sum(0))[:, None]
    counts = torch.zeros(batch, layers, dtype=torch.long, device=scores.device)
    return torch.minimum(counts.scatter_add(1, order // entries, kept.long()).T + fixed, live)


def bisected_drops(scores: Tensor, live: Tensor, target: Tensor, protect: int, tolerance: int = 5) -> Tensor:
    """The released search: entries that each layer drops, ``[L, B]``, at a threshold that comes near ``target`` ``[B]``.

    ``scores`` and ``live`` are those of `exact_counts`.
    """
    cumulative = priority(scores)
    low, high = torch.zeros_like(target), torch.ones_like(target)
    drops, done = torch.zeros_like(live), torch.zeros_like(target, dtype=torch.bool)
    for _ in range(40):
        middle = (low + high) / 2
        drops = (live - 1 - (cumulative < middle[:, None]).sum(-1) - protect).clamp(min=0)
        total = drops.sum(0)
        done = done | ((total - target).abs() < tolerance)
        low = torch.where(done | (total < target), low, middle)
        high = torch.where(done | (total >= target), high, middle)
    return drops


def best_of_layer(scores: Tensor, layout: Layout, counts: Sequence[int], start_size: int) -> Tensor:
    """Entries ``[B, 1, k]``, ascending, -1 = padding: the first ones, the last one, and the best to fill the counts."""
    nth = layout.valid.cumsum(1)
    last = upload(layout.live, scores.device)[:, None]
    free = layout.valid & (nth > start_size) & (nth < last)
    best = [max(count - start_size - 1, 0) for count in counts]
    kept = (layout.valid & ~free) | top_rows(scores, free, best)
    return Reduction.keeping(kept, tuple(counts)).anchor[:, None]


def dropped_at(share: float, profile: Mapping[str, Any]) -> list[float]:
    """Share that each layer drops where ``share`` stays on average: the profile's, linear between its budgets."""
    shares: list[float] = [0.0, *profile["keep"], 1.0]
    layers = len(profile["dropped"][0])
    dropped = [[1.0] * layers, *profile["dropped"], [0.0] * layers]
    right = min(bisect_right(shares, share), len(shares) - 1)
    part = (share - shares[right - 1]) / (shares[right] - shares[right - 1])
    return [below + part * (above - below) for below, above in zip(dropped[right - 1], dropped[right])]


def slot(prompt: int, distance: int) -> int:
    """Where a step of decoding evicts: ``distance`` from the end of the ``prompt`` entries left, or half way if too few."""
    if distance > 0:
        return distance
    return prompt + distance if prompt + distance >= 1 else prompt // 2


def evicted(held: int, seen: int, share: float, prompt: int, distance: int) -> int | None:
    """Which of the ``held`` entries goes, if they are more than ``share`` of the tokens ``seen``: one at most, at `slot`."""
    where = slot(prompt, distance)
    return where if int(held - seen * share) > 0 and where < held else None


@register
@dataclass(frozen=True)
class PrefixKV(Cache, Offline):
    """Keep in every layer the share of entries that holds the same share of attention; hold it while decoding."""

    name = "prefixkv"
    title = "PrefixKV"
    group = "kv_cache"
    paper = "arXiv 2412.03409"
    helps = (
        "Long answers: layers whose attention is spread keep more than others, and the cache keeps its share while it grows."
    )
    needs = ("decoder attention columns (all layers)", "cache ownership")
    identity_at = {"keep": 1.0}  # noqa: RUF012
    bound = ("start_size",)

    keep: Annotated[int | float, Keep()] = 0.8
    """Share of the prompt, or entries, text and pictures alike, that stays in a layer on average."""
    search: Literal["exact", "bisect", "offline"] = "exact"
    """How numbers of entries are found: to the entry, as released (``"bisect"``), or from the numbers of ``foveate
    calibrate prefixkv`` (``"offline"``).
    """
    start_size: Annotated[int, AtLeast(0)] = 1
    """First entries of the prompt that always stay."""
    distance: int = -25
    """Where decoding evicts, in entries from the end of what is left of the prompt; if positive, the place itself."""

    def check(self, traits: Traits) -> str | None:
        """A profile must be there to be read."""
        if self.search == "offline":
            return self.refuse_numbers(traits, "search='offline': needs a profile", ", or use 'exact'")
        return None

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention received in every layer whose cache may shrink, and the profile."""
        columns = tuple(Columns(Site("decoder", layer)) for layer in _layers(traits))
        return (*columns, Numbers(self.name)) if self.search == "offline" else columns

    def workspace(self, shape: Shape) -> int:
        """Attention of a chunk of queries, scores and entries of all layers, one layer's cache while it shrinks."""
        scores = 4 * shape.layers * shape.ids
        return shape.edits + shape.attention(CHUNK) + 2 * shape.masks + scores + 2 * shape.keys

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Importance ``[B, n]``; offline, where no other layer has a say, already the entries that stay."""
        scores = ranked(importance(seen[Columns(Site("decoder", layer))], layout.valid))
        if self.search != "offline":
            return scores
        counts = []
        for live in layout.live:
            share = self._budget().of(live) / live if isinstance(self.keep, int) else self.keep
            dropped = round(dropped_at(share, seen[Numbers(self.name)])[layer] * live)
            counts.append(live - max(min(dropped, live - self.start_size - 1), 0))
        return None if tuple(counts) == layout.live else best_of_layer(scores, layout, counts, self.start_size)

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """Search all layers at once. How many entries each keeps of each sample comes to the host, in one transfer."""
        kept: list[Kept | None] = [None] * len(scores)
        scored = {layer: score for layer, score in enumerate(scores) if score is not None}
        if not scored:
            return kept
        if self.search == "offline":
            there = torch.stack([(entries[:, 0] >= 0).sum(1) for entries in scored.values()]).tolist()
            for (layer, entries), of_layer in zip(scored.items(), there):
                kept[layer] = Kept(entries, counts=tuple(of_layer))
        else:
            counts = self._counts(list(scored.values()), [layouts[layer] for layer in scored])
            for (layer, score), of_layer in zip(scored.items(), counts):
                layout = layouts[layer]
                if tuple(of_layer) != layout.live:
                    kept[layer] = Kept(best_of_layer(score, layout, of_layer, self.start_size), counts=tuple(of_layer))
        return kept

    def step(self, layer: int, prompt: int, held: int, tokens: int, length: int) -> int | None:
        """Evict the entry at a fixed slot if the layer holds more than its share of what came before this step.

        Newer entries slide into the slot, so old ones behind it go first.
        """
        return evicted(held, tokens - 1, prompt / length, prompt, self.distance)

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Shares that each layer drops at nine budgets: the mean over the samples of what the search finds."""
        layers = _layers(call.traits)
        found = []
        for layout, seen in call.read(*(Columns(Site("decoder", layer)) for layer in layers)):
            scores = torch.stack([importance(seen[Columns(Site("decoder", layer))], layout.valid) for layer in layers])
            live = upload(layout.live, scores.device).expand(len(layers), -1)
            budgets = [(live[0] * len(layers) * share).long() for share in SHARES]
            counts = [exact_counts(scores, live, budget, self.start_size + 1) for budget in budgets]
            found.append(1 - torch.stack(counts) / live)  # [9, L, B]
        mean = torch.cat(found, dim=-1).mean(-1).cpu()
        table = mean.new_zeros(len(SHARES), call.traits.decoder_layers).index_copy(1, torch.tensor(layers), mean)
        return {"keep": list(SHARES), "dropped": table.tolist()}

    def _counts(self, scores: list[Tensor], layouts: list[Layout]) -> list[list[int]]:
        """Entries that each layer keeps of each sample, on the host."""
        device, widest = scores[0].device, max(score.shape[1] for score in scores)
        stacked = torch.stack([torch.nn.functional.pad(score, (0, widest - score.shape[1])) for score in scores])
        live = upload([layout.live for layout in layouts], device)
        # A share is one of all layers together, so that it is not rounded in each of them.
        totals = [sum(entries) for entries in zip(*(layout.live for layout in layouts))]
        budgets = [
            sum(self._budget().of(layout.live[b]) for layout in layouts) if isinstance(self.keep, int) else self.keep * total
            for b, total in enumerate(totals)
        ]
        if self.search == "exact":
            budget = upload([int(each) for each in budgets], device)
            return exact_counts(stacked, live, budget, self.start_size + 1).tolist()
        targets = [total - budget for total, budget in zip(totals, budgets)]
        target = upload(targets, device, torch.float32)
        drops = bisected_drops(stacked, live, target, self.start_size + 1).tolist()
        # Scaled to the budget and truncated, as released.
        factors = [target / max(sum(sample), 1) for target, sample in zip(targets, zip(*drops))]
        return [
            [entries - int(drop * factor) for entries, drop, factor in zip(layout.live, of_layer, factors)]
            for layout, of_layer in zip(layouts, drops)
        ]

    def _budget(self) -> Budget:
        return Budget(self.keep, "floor")


def _layers(traits: Traits) -> tuple[int, ...]:
    skipped = {*traits.recurrent, *traits.sliding}
    return tuple(layer for layer in range(traits.decoder_layers) if layer not in skipped)
