"""HERMES: the cache of a stream as sensory, working and long-term memory: each layer keeps what its depth is there for.

Paper: "HERMES: KV Cache as Hierarchical Memory for Efficient Streaming Video Understanding", arXiv 2601.14724. Shallow
layers keep what came last, deep ones what a request for a summary attends to, and fold what they drop into one entry; those
between weigh both. Scores are smoothed from the last layer down. ``recency=1.0, fading=0.9`` are the released code's
weights, the defaults the paper's. Differs from the released code: the guiding texts run through the model, as its eager path
and the paper have it (the released fast path gives every layer their embeddings). They are worded after the paper's
description; the one for the current scene alone is not read, as no layer's score depends on it. Reconstructed: outside of a
stream a prompt is compressed once, its own question in place of the guiding texts; no entry is folded in, positions stay.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.bounded import Bounded, Held, Turned
from foveate.core.budget import Budget
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.parameters import AtLeast, In, Keep
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Rows, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.methods.kv_cache.entries import kept
from foveate.ops.ranks import closed_up
from foveate.ops.select import top_k

SCENE = (
    "Describe the current scene in detail: which objects are there and where they are, what they look like, and what is "
    "being done at this moment."
)
SUMMARY = (
    "Summarise everything shown so far: who takes part, the key events in the order in which they happened, what changed "
    "between them, and what it is all about."
)
FORGETTING = (20.0, 0.5)
"""Rates at which recency fades, in the shallow layers and before the first deep one."""
SMOOTHING = (0.1, 0.3, 0.4)
"""Share of the next layer's score, in shallow, middle and deep layers."""

Depth = Literal["shallow", "middle", "deep"]


def depths(layers: int, shallow: float, deep: float) -> list[tuple[Depth, float]]:
    """What each layer is, and how far a middle one is from the shallow to the deep ones."""
    first, last = int(layers * shallow), int(layers * (1 - deep))
    among = [(layer - first) / max(last - first, 1) for layer in range(layers)]
    return [
        ("shallow", 0.0) if layer < first else ("deep", 1.0) if layer >= last else ("middle", among[layer])
        for layer in range(layers)
    ]


def spread(x: Tensor) -> Tensor:
    """``x`` ``[n]`` from 0 to 1."""
    return (x - x.min()) / (x.max() - x.min() + 1e-6)


def fading(count: int, rate: float, like: Tensor) -> Tensor:
    """Recency of ``count`` entries, the oldest first, from 0 to 1."""
    age = torch.arange(count - 1, -1, -1, device=like.device, dtype=torch.float32) / max(count - 1, 1)
    return spread((-rate * age).exp())


def depth_score(attention: Tensor, depth: Depth, progress: float, recency: float, slope: float) -> Tensor:
    """Scores ``[n]`` of a layer's entries, the oldest first, from the ``attention`` ``[n]`` that they get."""
    if depth == "deep":
        return spread(attention)
    shallow, last = FORGETTING
    recent = fading(len(attention), shallow + (last - shallow) * progress, attention)
    if depth == "shallow":
        return recent
    weight = recency - slope * progress
    return (1 - weight) * spread(attention) + weight * recent


def smoothed(scores: Sequence[Tensor], kinds: Sequence[Depth], raw: bool = False) -> list[Tensor]:
    """Scores with a share of the next layer's, ``raw`` or already smoothed itself."""
    shares = dict(zip(("shallow", "middle", "deep"), SMOOTHING))
    found = [scores[-1]]
    for (score, behind), kind in zip(reversed(list(pairwise(scores))), reversed(kinds[:-1])):
        following = behind if raw else found[0]
        if len(following) != len(score):
            following = torch.nn.functional.interpolate(following[None, None], len(score), mode="linear")[0, 0]
        found.insert(0, (1 - shares[kind]) * score + shares[kind] * following)
    return found


def folded(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """One entry ``[1, H, 1, d]`` for many ``[1, H, n, d]``, whose keys stand at one position."""
    return keys.float().mean(2, keepdim=True).to(keys.dtype), values.float().mean(2, keepdim=True).to(values.dtype)


@register
@dataclass(frozen=True)
class Hermes(Bounded):
    """Bound a stream's cache: recent entries in shallow layers, lasting ones in deep layers."""

    name = "hermes"
    title = "HERMES"
    group = "kv_cache"
    paper = "arXiv 2601.14724"
    helps = "Streams: memory and time to the first token stay the same however long a video runs."
    needs = ("decoder attention rows of the question (all layers)", "cache ownership")
    textual = False
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 4000
    """Entries of each layer behind the text in front of a stream's first picture; of a single prompt, its visual entries, or
    a share of them.
    """
    shallow: Annotated[float, In(0, 1)] = 0.1
    """Share of the layers that keep what came last."""
    deep: Annotated[float, In(0, 1)] = 0.3
    """Share of the layers, the last ones, that keep what a summary attends to."""
    recency: Annotated[float, In(0, 1)] = 0.75
    """Weight of recency in the first middle layer."""
    fading: Annotated[float, In(0, 1)] = 0.6
    """By how much that weight falls up to the deep layers."""
    smoothing: Literal["smoothed", "raw"] = "smoothed"
    """Whether a layer's score takes up the next one's as already smoothed (the code) or as it was (the paper's formula)."""
    reindex: Literal["lazy", "eager"] = "lazy"
    """Whether a stream's positions are closed up only when the model soon knows no larger ones, or at every compression."""
    texts: tuple[str, str] = (SCENE, SUMMARY)
    """What a stream's entries are held against: a request to describe the scene, and one to summarise."""
    headroom: Annotated[int, AtLeast(0)] = 1024
    """Positions that ``"lazy"`` leaves free for later chunks, a question and its answer."""

    def check(self, traits: Traits) -> str | None:
        """Every layer holds the whole stream, and a stream's budget is a count."""
        odd = sorted({*traits.sliding, *traits.recurrent})
        if odd:
            return (
                f"decoder layer {odd[0]} of {traits.family} does not hold all entries, and scores are smoothed over all "
                "layers; use snapkv"
            )
        if self.shallow + self.deep > 1:
            return f"shallow={self.shallow}: must be {1 - self.deep:g} or less, as deep={self.deep} of the layers are deep"
        return None

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The rows of the guiding text, or the question, in every layer."""
        return tuple(_asking(layer) for layer in range(traits.decoder_layers))

    def workspace(self, shape: Shape) -> int:
        """The question's rows of one layer, scores of all, and the cache of a layer while it shrinks."""
        scores = 2 * (shape.layers + 3) * shape.entries
        return super().workspace(shape) + shape.attention(shape.rows - shape.visual) + scores + 2 * shape.keys

    # A stream.

    @property
    def capacity(self) -> int:
        """The budget, which must be a count."""
        self.require(isinstance(self.keep, int), "keep", "a stream has no length to take a share of; give a count")
        return int(self.keep)

    def guidance(self, said: tuple[str, str] | None) -> tuple[str, ...]:
        """For deep layers a summary, for those between the scene and a summary."""
        before = "" if said is None else f"You were asked: {said[0]} You answered: {said[1]} "
        scene, summary = self.texts
        return before + summary, f"{before}{scene}; {summary}"

    def retain(self, held: Sequence[Held], turned: Turned, limit: int | None) -> list[Held]:
        """The best entries of each layer, in deep ones a last entry for all that goes."""
        kinds = depths(len(held), self.shallow, self.deep)
        attention = [layer.attention[kind == "middle"][layer.prefix :] for layer, (kind, _) in zip(held, kinds)]
        scores = self._scores(attention)
        stays = [
            _best(layer, score, self.capacity - (kind == "deep")) for layer, score, (kind, _) in zip(held, scores, kinds)
        ]
        largest = torch.stack([layer.positions.max() for layer in held]).max()
        full = limit is not None and int(largest) > limit - self.headroom
        closing = self.reindex == "eager" or full
        return [
            self._left(number, layer, stay, kind == "deep", turned, closing)
            for number, (layer, stay, (kind, _)) in enumerate(zip(held, stays, kinds))
        ]

    def _left(self, number: int, held: Held, stay: Tensor, folds: bool, turned: Turned, closing: bool) -> Held:
        keys, values = held.keys[:, :, stay], held.values[:, :, stay]
        positions = held.positions[:, stay]
        if closing:
            old, positions = positions, closed_up(positions, held.prefix)
            keys = turned(number, keys, old, positions)
        if folds and len(stay) < held.keys.shape[2]:
            gone = torch.ones(held.keys.shape[2], dtype=torch.bool, device=stay.device).index_fill(0, stay, False)
            gone = gone.to(torch.uint8).argsort(descending=True, stable=True)[: held.keys.shape[2] - len(stay)]
            behind = (positions.max() + 1).expand(len(positions), 1)
            moved = turned(number, held.keys[:, :, gone], held.positions[:, gone], behind.expand(-1, len(gone)))
            key, value = folded(moved, held.values[:, :, gone])
            keys, values = torch.cat([keys, key], dim=2), torch.cat([values, value], dim=2)
            positions = torch.cat([positions, behind], dim=1)
        return Held(keys, values, positions, held.prefix)

    def _scores(self, attention: Sequence[Tensor]) -> list[Tensor]:
        kinds = depths(len(attention), self.shallow, self.deep)
        scores = [
            depth_score(mass, kind, progress, self.recency, self.fading) for mass, (kind, progress) in zip(attention, kinds)
        ]
        return smoothed(scores, [kind for kind, _ in kinds], raw=self.smoothing == "raw")

    # A single prompt, and the guiding texts.

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Attention ``[B, n]`` of the question, or of a guiding text: the mean over heads and words."""
        attention: Attention = seen[_asking(layer)]
        probabilities = attention.probabilities()
        asking = (attention.logits.amax((1, 3)) > float("-inf")).sum(1)
        return ranked(probabilities.sum((1, 2)) / (probabilities.shape[1] * asking)[:, None])

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """Of each sample's visual entries the best of every layer, and all that is not visual."""
        budget = Budget(self.keep)
        counts = [[min(budget.of(visual), visual) for visual in layout.visual] for layout in layouts]
        if all(tuple(count) == layout.visual for count, layout in zip(counts, layouts)):
            return [None] * len(scores)
        ranks = [torch.zeros_like(layout.valid, dtype=torch.float32) for layout in layouts]
        for sample in range(len(counts[0])):
            places = [_places(layout, sample) for layout in layouts]
            if len(places[0]):
                mass = [score[sample, place] for score, place in zip(scores, places) if score is not None]
                for rank, place, score in zip(ranks, places, self._scores(mass)):
                    rank[sample] = rank[sample].scatter(0, place, score)
        return [kept(rank[:, None], layout, "visual", count) for rank, layout, count in zip(ranks, layouts, counts)]


def _best(held: Held, score: Tensor, count: int) -> Tensor:
    """``[k]`` ascending: the prefix, and the best entries behind it."""
    prefix = torch.arange(held.prefix, device=score.device)
    return torch.cat([prefix, top_k(score, max(count, 0)).sort().values + held.prefix])


def _places(layout: Layout, sample: int) -> Tensor:
    """``[n]`` visual rows of a sample, ascending."""
    visual = layout.rows(*VISUAL)[sample]
    return (~visual).to(torch.uint8).argsort(stable=True)[: layout.visual[sample]]


def _asking(layer: int) -> Rows:
    return Rows(Site("decoder", layer), "question", keys="cache")
