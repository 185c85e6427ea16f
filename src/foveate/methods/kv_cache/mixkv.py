"""MixKV: rank cached entries by importance and, the more alike the keys of a head are, by how different an entry is.

Paper: "Mixing Importance with Diversity: Joint Optimization for KV Cache Compression in Large Vision-Language Models", arXiv
2510.20707. A scoring plug-in: the ``host`` sets the budgets (SnapKV the same everywhere, PyramidKV falling with depth, AdaKV
by head), the mixed score says which entries of a head stay. Differs from the released code: redundancy is the prompt's own,
as in the paper; the code reads a table made offline (``redundancy="table"``, `foveate calibrate mixkv`). It is clamped to
[0, 1], and constant value norms do not fail. Entries stay in their order. Prompts not longer than the window are left alone.
"""

from __future__ import annotations

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
from foveate.core.parameters import AtLeast, In, Keep, Odd
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Attention, KeyValue, Numbers, Rows, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.methods.kv_cache.entries import best_entries, last_entries
from foveate.methods.kv_cache.pyramidkv import falling
from foveate.methods.kv_cache.snapkv import window_scores
from foveate.ops.select import top_k


def key_geometry(keys: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """How alike the keys of a head are.

    Args:
        keys: ``[B, Hkv, n, d]``.
        valid: ``[B, n]`` bool.

    Returns:
        ``[B, Hkv, n]`` product of each unit key and the mean of all, and ``[B, Hkv, 1]`` redundancy: the mean cosine of two
        different keys, in [0, 1]; float32.
    """
    unit = torch.nn.functional.normalize(keys.float(), dim=-1) * valid[:, None, :, None]
    count = valid.sum(1)[:, None, None]
    mean = unit.sum(2) / count
    # The squared length of the sum counts every pair twice and each key with itself.
    redundancy = (count * mean.square().sum(-1, keepdim=True) - 1) / (count - 1).clamp(min=1)
    return (unit @ mean[..., None])[..., 0], redundancy.clamp(0, 1)


def rescaled(x: Tensor, like: Tensor, among: Tensor) -> Tensor:
    """``x`` ``[B, Hkv, n]``, min-max scaled among the candidates ``[B, n]``, then to the mean of ``like``; 0 elsewhere."""
    among = among[:, None]
    low = x.masked_fill(~among, float("inf")).amin(-1, keepdim=True)
    high = x.masked_fill(~among, float("-inf")).amax(-1, keepdim=True)
    spread = ((x - low) / (high - low + 1e-8)).masked_fill(~among, 0)
    count = among.sum(-1, keepdim=True).clamp(min=1)
    target = (like * among).sum(-1, keepdim=True) / count
    return spread * target / (spread.sum(-1, keepdim=True) / count + 1e-8)


def mixed_scores(
    attention: Tensor, keys: Tensor, values: Tensor, valid: Tensor, among: Tensor, redundancy: Tensor | None = None
) -> Tensor:
    """Importance and diversity, mixed by redundancy.

    Args:
        attention: ``[B, Hkv, n]`` the host's scores.
        keys, values: ``[B, Hkv, n, d]``.
        valid: ``[B, n]`` bool: entries that are not padding.
        among: ``[B, n]`` bool: the candidates.
        redundancy: ``[Hkv, 1]`` from a table instead of the prompt's own.

    Returns:
        ``[B, Hkv, n]`` float32.
    """
    similarity, own = key_geometry(keys, valid)
    weight = own if redundancy is None else redundancy
    importance = attention + rescaled(values.float().norm(dim=-1), attention, among)
    return (1 - weight) * importance + weight * rescaled(-similarity, attention, among)


def head_capacities(attention: Tensor, among: Tensor, capacity: Sequence[int], floor: float, normalise: bool) -> Tensor:
    """AdaKV: the budget of all heads goes to the best entries of all heads, all but a share that every head has.

    Args:
        attention: ``[B, Hkv, n]`` the host's scores.
        among: ``[B, n]`` bool: the candidates.
        capacity: mean budget of a head, for each sample.
        floor: the share.
        normalise: weigh each head by the share of its mass that its best ``capacity`` entries have.

    Returns:
        ``[B, Hkv]`` integers.
    """
    heads, entries = attention.shape[1:]
    mean = upload(capacity, attention.device)[:, None]
    assured = upload([int(floor * each) for each in capacity], attention.device)[:, None]
    scores = attention * among[:, None]
    if normalise:
        head = torch.arange(entries, device=scores.device) < mean[..., None]
        mass = (scores.sort(dim=-1, descending=True).values * head).sum(-1)
        scores = scores * (mass / scores.sum(-1).clamp(min=torch.finfo(scores.dtype).tiny))[..., None]
    order = top_k(scores.masked_fill(~among[:, None], float("-inf")).flatten(1), heads * entries)
    best = torch.arange(heads * entries, device=scores.device) < heads * mean
    counts = torch.zeros_like(scores[..., 0], dtype=torch.long).scatter_add(1, order // entries, best.long())
    shared = (counts.float() * (1 - floor) + assured).round().long()
    most = among.sum(1)[:, None]
    # Truncating the assured share must cost nothing where there is room for all.
    return torch.minimum(shared, most).where(mean < most, most)


def ragged_entries(scores: Tensor, counts: Tensor) -> Tensor:
    """The ``counts`` ``[B, Hkv]`` best entries of each head, ascending: ``[B, Hkv, n]``, -1 = padding, on the left."""
    best = top_k(scores, scores.shape[-1])
    spare = torch.arange(scores.shape[-1], device=scores.device) >= counts[..., None]
    return best.masked_fill(spare, -1).sort(dim=-1).values


@register
@dataclass(frozen=True)
class MixKV(Cache, Offline):
    """Keep a share of every layer's cached entries, chosen for each head by importance and diversity."""

    name = "mixkv"
    title = "MixKV"
    group = "kv_cache"
    paper = "arXiv 2510.20707"
    helps = "Long answers to prompts that repeat themselves (many pictures, videos): entries like others make room."
    needs = ("decoder attention rows (all layers)", "cache ownership")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the prompt, or entries of a head, text and pictures alike, the window included; the mean over layers and
    heads.
    """
    host: Literal["snapkv", "pyramidkv", "adakv"] = "snapkv"
    """Which budgets: the same everywhere (``"snapkv"``), falling with depth (``"pyramidkv"``), by head (``"adakv"``)."""
    window: Annotated[int, AtLeast(1)] = 32
    """Queries at the end of the prompt whose attention counts; their own entries stay. A prompt not longer is left alone."""
    kernel: Annotated[int, Odd()] = 5
    """Width, in entries, of the pooling of scores along the prompt."""
    pooling: Literal["average", "max"] = "average"
    """Kind of that pooling."""
    redundancy: Literal["online", "table"] = "online"
    """Whether how alike keys are is measured on each prompt, or read from the numbers of ``foveate calibrate mixkv``
    (``"table"``).
    """
    beta: Annotated[int, AtLeast(1)] = 20
    """PyramidKV: how steeply budgets fall: the last layer has about 1/beta of the mean."""
    floor: Annotated[float, In(0, 1)] = 0.2
    """AdaKV: share of the budget that every head has."""
    normalise: bool = True
    """AdaKV: weigh heads by how concentrated they are."""

    def check(self, traits: Traits) -> str | None:
        """A table must be there to be read."""
        if self.redundancy == "table":
            return self.refuse_numbers(traits, "redundancy='table': needs a table", ", or use 'online'")
        return None

    @property
    def by_head(self) -> bool:
        """AdaKV parts the budget among the heads."""
        return self.host == "adakv"

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The window's rows in every layer, and the table."""
        rows = tuple(Rows(Site("decoder", layer), self.window, keys="cache") for layer in _attention_layers(traits))
        return (*rows, Numbers(self.name)) if self.redundancy == "table" else rows

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """Prompts differ in how many rows the question has."""
        return {"window": (8, 16, 32, 64), "host": ("snapkv", "pyramidkv", "adakv")}

    def workspace(self, shape: Shape) -> int:
        """As `SnapKV`'s with two scores, of all layers where the host looks at all, and the geometry of a layer's keys."""
        scores = 2 * (shape.layers + 8) * shape.entries + (0 if self.layer_by_layer else 2 * shape.layers * shape.entries)
        return shape.edits + shape.attention(self.window) + scores + 2 * shape.keys + 4 * shape.floats(shape.keys)

    @property
    def layer_by_layer(self) -> bool:
        """PyramidKV's budgets go by depth, and what AdaKV's heads keep is read from the device once for all layers."""
        return self.host == "snapkv"

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """The host's score and the mixed one, ``[2, B, Hkv, n]``, window entries at inf; None where everything stays."""
        counts = self._counts(layout)
        if tuple(counts) == layout.live:
            return None
        observed: Attention = seen[Rows(Site("decoder", layer), self.window, keys="cache")]
        rows = observed.probabilities()
        # Query heads are averaged before they are pooled: that matters for the maximum.
        rows = rows.reshape(len(rows), keys.shape[1], -1, *rows.shape[2:]).mean(2)
        window = last_entries(layout.valid, [min(self.window, count) for count in counts])
        among = layout.valid & ~window
        attention = window_scores(rows, window, keys.shape[1], self.kernel, self.pooling) * among[:, None]
        table = seen[Numbers(self.name)]["redundancy"][layer][:, None] if self.redundancy == "table" else None
        mixed = ranked(mixed_scores(attention, keys, values, layout.valid, among, table))
        return torch.stack([attention, mixed]).masked_fill(window[:, None], float("inf"))

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """The host's budget in every layer, filled by the mixed score."""
        scored = {layer: score for layer, score in enumerate(scores) if score is not None}
        kept: list[Kept | None] = [None] * len(scores)
        if self.host == "adakv" and scored:
            totals = [self._heads(score, layouts[layer]) for layer, score in scored.items()]
            on_host = torch.stack(totals).tolist()  # how many entries each head has depends on the scores: read once
            for (layer, (_, mixed)), total, counts in zip(scored.items(), totals, on_host):
                padded = mixed.masked_fill(~layouts[layer].valid[:, None], float("-inf"))
                kept[layer] = Kept(ragged_entries(padded, total), by_head=tuple(map(tuple, counts)))
        else:
            for depth, (layer, score) in enumerate(scored.items()):
                kept[layer] = self._kept(score, layouts[layer], depth, len(scored))
        return kept

    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """Redundancy of each layer's heads, ``[layers, Hkv]``: the mean over the samples."""
        layers = _attention_layers(call.traits)
        found = [
            torch.stack(
                [key_geometry(seen[KeyValue(Site("decoder", layer))][0], layout.valid)[1][..., 0] for layer in layers]
            )
            for layout, seen in call.read(*(KeyValue(Site("decoder", layer)) for layer in layers))
        ]
        mean = torch.cat(found, dim=1).mean(1).cpu()
        return {
            "redundancy": mean.new_zeros(call.traits.decoder_layers, mean.shape[1]).index_copy(0, torch.tensor(layers), mean)
        }

    def _heads(self, score: Tensor, layout: Layout) -> Tensor:
        """AdaKV: entries that each head keeps, ``[B, Hkv]``."""
        attention, mixed = score
        windows, capacity = self._windows(layout)
        among = layout.valid & mixed[:, 0].isfinite()
        heads = head_capacities(attention.masked_fill(~among[:, None], 0), among, capacity, self.floor, self.normalise)
        return heads + upload(windows, heads.device)[:, None]

    def _kept(self, score: Tensor, layout: Layout, depth: int, layers: int) -> Kept:
        windows, capacity = self._windows(layout)
        if self.host == "pyramidkv":
            others = [live - window for live, window in zip(layout.live, windows)]
            capacity = [falling(c, n, depth, layers, self.beta) if c < n else n for c, n in zip(capacity, others)]
        return Kept(best_entries(score[1], layout.valid, [c + window for c, window in zip(capacity, windows)]))

    def _windows(self, layout: Layout) -> tuple[list[int], list[int]]:
        """Entries that each sample keeps in its window, and beside it."""
        counts = self._counts(layout)
        windows = [min(self.window, count) for count in counts]
        return windows, [count - window for count, window in zip(counts, windows)]

    def _counts(self, layout: Layout) -> list[int]:
        """Entries that a head keeps of each sample."""
        return [live if live <= self.window else self._budget().of(live) for live in layout.live]

    def _budget(self) -> Budget:
        return Budget(self.keep, "floor")


def _attention_layers(traits: Traits) -> tuple[int, ...]:
    return tuple(layer for layer in range(traits.decoder_layers) if layer not in traits.recurrent)
