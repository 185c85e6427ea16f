"""AirCache: keep the visual entries that telling words of the question attend to, more in layers that look harder.

Paper: "AirCache: Activating Inter-Modal Relevancy KV Cache Compression for Efficient Large Vision-Language Model
Inference", arXiv 2503.23956. Text entries never go. No code is public: everything follows notes about the paper.
Reconstructed: attention is averaged over heads before words are chosen and entries ranked; the words to choose from are the
text behind the last visual token, as text before a picture cannot look at it (a third-party implementation takes all text);
strength and skewness are divided by their means over the layers, skewness being that of a sample, and 0 where it is less;
what a layer has no entries for goes to the others in the same proportion, so that the budget of all together is met
exactly; a prompt's pictures are one pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Cache, Kept
from foveate.core.parameters import In, Keep
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Rows, Seen, Signal, Site
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.methods.kv_cache.entries import kept
from foveate.ops.select import mask_of
from foveate.ops.share import dealt


def elite(attention: Attention, text: Tensor, alpha: float) -> Tensor:
    """Words that the last one attends to nearly as much as to the one that it attends to most: ``[B, Q]`` bool.

    Args:
        attention: rows of the question's words ``[B, H, Q, K]``.
        text: ``[B, Q]`` entries of these words, ascending; -1 = padding, on the left.
        alpha: share of the largest attention that a word must get.
    """
    heads = attention.logits.shape[1]
    among = attention.logits[:, :, -1].gather(2, text.clamp(min=0)[:, None].expand(-1, heads, -1))
    seen = among.masked_fill((text < 0)[:, None], float("-inf")).softmax(-1).mean(1)
    return (seen >= alpha * seen.amax(1, keepdim=True)) & (text >= 0)


def relevance(
    attention: Attention, text: Tensor, chosen: Tensor, visual: Tensor, among: Literal["elite", "row"] = "elite"
) -> Tensor:
    """Attention that each visual entry gets from the chosen words, the mean over words and heads.

    Args:
        attention: rows of the question's words ``[B, H, Q, K]``.
        text: ``[B, Q]`` entries of these words, -1 = padding.
        chosen: ``[B, Q]`` bool.
        visual: ``[B, K]`` bool.
        among: whether the softmax is over visual entries and chosen words, or over the whole row.

    Returns:
        ``[B, K]`` float32, 0 where an entry is not visual.
    """
    logits, lse = attention.logits, attention.lse
    if among == "elite":
        words = mask_of(text.masked_fill(~chosen, -1), logits.shape[3])
        logits = logits.masked_fill(~(visual | words)[:, None, None], float("-inf"))
        lse = logits.logsumexp(-1)
    # Words that were not chosen, padding among them, may have nothing to look at.
    spoken = chosen[:, None, :, None]
    seen = (logits - lse[..., None]).exp().masked_fill(~spoken, 0)
    mean = seen.sum((1, 2)) / (logits.shape[1] * chosen.sum(1, keepdim=True).clamp(min=1))
    return mean.masked_fill(~visual, 0)


def skewness(scores: Tensor, among: Tensor) -> Tensor:
    """Adjusted Fisher-Pearson skewness ``[...]`` of ``scores`` ``[..., n]`` where ``among``; 0 where they say nothing."""
    count = among.sum(-1).to(scores.dtype)
    mean = (scores * among).sum(-1) / count.clamp(min=1)
    centred = (scores - mean[..., None]) * among
    deviation = (centred.square().sum(-1) / (count - 1).clamp(min=1)).sqrt()
    # Cubes of what is small are nothing in float32, so the division comes first.
    cubes = (centred / deviation.clamp(min=torch.finfo(scores.dtype).tiny)[..., None]).pow(3).sum(-1)
    # What differs by rounding only is flat.
    tells = (count > 2) & (deviation > 4 * torch.finfo(scores.dtype).eps * mean.abs())
    return torch.where(tells, count / ((count - 1) * (count - 2)).clamp(min=1) * cubes, 0)


def multipliers(strength: Tensor, skew: Tensor, there: Tensor) -> Tensor:
    """What the retention of each layer is to the mean of all: ``[L, B]``, mean 1 over the layers that are ``there``.

    Args:
        strength, skew: ``[L, B]``.
        there: ``[L, B]`` bool.
    """

    def normalised(x: Tensor) -> Tensor:
        x = x.clamp(min=0) * there
        mean = x.sum(0) / there.sum(0).clamp(min=1)
        return torch.where(mean > 0, x / mean.clamp(min=torch.finfo(x.dtype).tiny), 1.0)

    return (normalised(strength) + normalised(skew)) / 2


@register
@dataclass(frozen=True)
class AirCache(Cache):
    """Keep a share of the visual entries of all layers, ranked by the question's telling words."""

    name = "aircache"
    title = "AirCache"
    group = "kv_cache"
    paper = "arXiv 2503.23956"
    helps = "Long answers about large pictures at tight budgets: text stays whole, and layers that look harder keep more."
    needs = ("decoder attention rows of the question (all layers)", "cache ownership")
    textual = False
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.1
    """Share of a layer's visual entries, or how many of them, that stay: the mean over layers."""
    alpha: Annotated[float, In(0, 1)] = 0.9
    """How much attention of the last word another must get to be asked too, as a share of the most that any gets."""
    among: Literal["elite", "row"] = "elite"
    """What attention to the picture is a share of: that to visual entries and words asked, as published, or all
    (``"row"``), as a third-party implementation has it.
    """

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The question's rows in every layer with a full cache."""
        full = set(range(traits.decoder_layers)) - {*traits.sliding, *traits.recurrent}
        return tuple(_question(layer) for layer in sorted(full))

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How many words are asked."""
        return {"alpha": Range(0.1, 1.0)}

    def workspace(self, shape: Shape) -> int:
        """The question's rows of one layer, scores and entries of all, and one layer's cache while it shrinks."""
        scores = 3 * (shape.layers + 4) * shape.ids
        return shape.edits + shape.attention(shape.rows - shape.visual) + scores + 2 * shape.keys

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Relevance ``[B, n]`` of one layer's visual entries, 0 elsewhere; None where there are none."""
        if not any(layout.visual):
            return None
        attention: Attention = seen[_question(layer)]
        text = last_of(layout.question, attention.logits.shape[2])
        visual = layout.rows(*VISUAL)
        chosen = elite(attention, text, self.alpha)
        return ranked(relevance(attention, text, chosen, visual, self.among))

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """Deal the budget out to all layers. How many entries each keeps of each sample is read from the device once."""
        found: list[Kept | None] = [None] * len(scores)
        scored = {layer: score for layer, score in enumerate(scores) if score is not None}
        there = [layouts[layer].visual for layer in scored]
        totals = [Budget(self.keep).across(of_sample) for of_sample in zip(*there)]
        if totals == [sum(of_sample) for of_sample in zip(*there)]:
            return found
        masks = {layer: layouts[layer].rows(*VISUAL) for layer in scored}
        strength = torch.stack([score.sum(1) for score in scored.values()])
        skew = torch.stack([skewness(score, masks[layer]) for layer, score in scored.items()])
        most = upload(there, strength.device)
        claims = multipliers(strength, skew, most > 0) * most
        counts = dealt(claims.T, upload(totals, most.device), most.T, most.T.clamp(max=1)).T.tolist()
        for (layer, score), of_layer in zip(scored.items(), counts):
            found[layer] = kept(score[:, None], layouts[layer], "visual", of_layer)
        return found


def _question(layer: int) -> Rows:
    return Rows(Site("decoder", layer), "question", keys="cache")
