"""METEOR: encoders share a budget, tokens go that others repeat, and heads that look at the picture say how many stay.

Paper: "METEOR: Multi-Encoder Collaborative Token Pruning for Efficient Vision Language Models", ICCV 2025, arXiv 2507.20842.
No code is public; reconstructed from public notes with its formulas. Where a family has several encoders, each one's blocks
are cut into three equal segments, behind each of which patches go: in proportion to the ranks of their feature maps the
encoders share what all of them may keep together, and each keeps the patches that are least like their mean, or, behind the
second and third segment and where there is a CLS token, have most of its attention. Before the language model those tokens
of a picture stay that are least like the tokens of its other encoders (sums of cosines). The last stage, which the paper
uses alone on models as they are, too, is all that models of one encoder get: the attention that text behind the picture pays
to the visual tokens, summed, is a head's visual attention value; the heads with the largest ones vote: how much they pay in
all, times a factor, is the number of tokens that stay, so questions that need detail (text in the picture) keep more, and
those tokens stay that they attend to most.

The paper trains its model with the first two stages. Reconstructed: one cut at each segment's end; the shares kept there and
before the language model, which the notes do not name; ranks are given (`numerical_rank` measures them), or every encoder
keeps the same share; what is left is numbered without gaps. Of the last stage: the mean over the text's rows, softmax over
all keys, the layer, the number of heads and the factor: ``factor`` = wanted tokens / mean of what the heads pay, over
prompts of one's own; positions stay.

The count depends on the data: it comes to the host once for each forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, CountOrShare, In
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Item
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.select import top_k, top_of_groups, top_rows
from foveate.ops.share import dealt

SEGMENTS = 3
"""Into which an encoder's blocks are cut."""


def votes(attention: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """What the heads that look at the picture most pay to its tokens.

    Args:
        attention: ``[B, H, N]`` of each head to each row, 0 for rows that are not visual.
        heads: how many of them vote, the first of equals.

    Returns:
        ``[B, N]`` what each row gets of them, and ``[B]`` what they pay in all.
    """
    chosen = top_k(attention.sum(2), heads)
    paid = attention.gather(1, chosen[..., None].expand(-1, -1, attention.shape[2])).sum(1)
    return paid, paid.sum(1)


def from_text(asked: Attention) -> Tensor:
    """``[B, H, K]`` attention of each head, the mean over the rows of the question (padding, which sees nothing, aside)."""
    there = (asked.logits > float("-inf")).any(3, keepdim=True)
    counted = asked.probabilities().masked_fill(~there, 0)
    return counted.sum(2) / there.sum(2).clamp(min=1)


def numerical_rank(features: Tensor, eps: float = 1e-3) -> Tensor:
    """``[I]`` how many singular values of ``features`` ``[I, n, D]`` are above ``eps`` times the largest."""
    ranks: Tensor = torch.linalg.matrix_rank(features.float(), rtol=eps)
    return ranks


def likeness_to_mean(x: Tensor, tokens: Tensor) -> Tensor:
    """``[I, N]`` cosine of each row of ``x`` ``[I, N, D]`` with the mean of the ``tokens`` ``[I, N]`` (bool), float32."""
    x = x.float()
    mean = (x * tokens[..., None]).sum(1, keepdim=True) / tokens.sum(1).clamp(min=1)[:, None, None]
    return torch.cosine_similarity(x, mean, dim=2)


def redundancy(x: Tensor, picture: Tensor, encoder: Tensor, pictures: int, encoders: int) -> Tensor:
    """``[B, N]`` sum of the cosines of each token with all tokens of its picture's other encoders, float32.

    Args:
        x: ``[B, N, D]``.
        picture: ``[B, N]`` number of each row's picture, -1 for rows that are no token of one, which count for nothing.
        encoder: ``[B, N]`` number of its encoder.
        pictures: how many pictures a sample has at most.
        encoders: how many encoders there are.
    """
    unit = torch.nn.functional.normalize(x.float(), dim=2).masked_fill((picture < 0)[..., None], 0)
    group = (picture.clamp(min=0) * encoders + encoder.clamp(min=0))[..., None].expand_as(unit)
    sums = unit.new_zeros(len(x), pictures * encoders, x.shape[2]).scatter_add(1, group, unit)
    of_pictures = sums.reshape(len(x), pictures, encoders, -1).sum(2).repeat_interleave(encoders, dim=1)
    return (unit * (of_pictures - sums).gather(1, group)).sum(2)


@register
@dataclass(frozen=True)
class Meteor(Tokens):
    """Drop visual tokens in each of several encoders, where these repeat each other, and before one decoder layer: there as
    many as its heads' attention to the picture asks for.
    """

    name = "meteor"
    title = "METEOR"
    group = "in_llm"
    paper = "arXiv 2507.20842"
    helps = "Questions that differ in how much they ask of the picture: each has as many tokens as it pays attention to."
    needs = ("decoder attention rows of the question (1 layer)",)
    identity_at = {"factor": 1e9, "encoding": 1.0, "fusion": 1.0}  # noqa: RUF012

    factor: Annotated[float, AtLeast(0)] = 100.0
    """Tokens that stay for each whole row of attention that the heads pay to the picture, at least one token; our choice."""
    heads: Annotated[int | float, CountOrShare("heads")] = 0.25
    """Heads that vote: a number, or a share of all of them, at least one; our choice."""
    layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer before which tokens are dropped, by the attention of the one before; None = a third of the depth."""
    encoding: Annotated[float, In(0, 1)] = 0.83
    """Of several encoders, the share of their tokens, all together, that each of their three segments keeps; our choice."""
    fusion: Annotated[float, In(0, 1)] = 0.83
    """Of several encoders, the share of what they leave that goes to the language model, at least one token; our choice."""
    ranks: tuple[Annotated[float, AtLeast(0)], ...] | None = None
    """Of several encoders, the rank of the feature map behind each segment: those of all encoders behind the first segment,
    then behind the second and third; None = all encoders keep the same share."""

    def fitted(self, traits: Traits) -> Self:
        """The layer at a third of the depth."""
        return replace(self, layer=self.layer or max(1, traits.decoder_layers // 3))

    def check(self, traits: Traits) -> str | None:
        """The layer must exist, and the one before it attend; encoders must have segments, and known numbers of tokens."""
        layer, towers = self.fitted(traits).layer or 1, traits.towers
        unknown = next((n for n, one in enumerate(towers) if one.tokens is None or one.feature_layer + 1 < SEGMENTS), None)
        if unknown is not None:
            return (
                f"encoder {unknown} of {traits.family} has fewer than {SEGMENTS} blocks, or no fixed number of tokens; use "
                "it on models of one encoder"
            )
        if towers and self.ranks is not None and len(self.ranks) != SEGMENTS * len(towers):
            return (
                f"ranks={self.ranks}: must be {SEGMENTS} for each of {len(towers)} encoders, {SEGMENTS * len(towers)} in all"
            )
        return traits.refuse_layers("layer", layer, attention=[layer - 1])

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Behind the segments of several encoders, where these come together, and the input of the layer."""
        blocks = tuple(Site("encoder", block, "after") for ends in segments(traits) for block in ends)
        fusion = (Site("sequence"),) if traits.towers else ()
        return (*blocks, *fusion, Site("decoder", self.fitted(traits).layer or 1))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """What the question attends to in the layer before; what CLS attends to at the end of later segments."""
        ends = zip(traits.towers, segments(traits))
        attention = [Rows(Site("encoder", block), "cls") for one, blocks in ends if one.has_cls for block in blocks[1:]]
        return (*attention, self._asked(self.fitted(traits).layer or 1))

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How many tokens attention is worth."""
        return {"factor": Range(10.0, 1000.0, log=True)}

    def workspace(self, shape: Shape) -> int:
        """Attention of the question, of which all that is not visual may be part; tokens at length 1, and their sums."""
        fusion = 0 if shape.images else 3 * shape.floats(shape.hidden)
        return shape.edits + 2 * shape.attention(max(shape.rows - shape.visual, 1)) + fusion

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank patches of each encoder, tokens of each picture's encoders jointly, visual rows of each sample jointly."""
        traits: Traits = state.get("session", "traits")
        if site.kind == "encoder":
            return self._encode(site.layer, x, layout, seen, traits)
        if site.kind == "sequence":
            return self._fuse(x, layout, len(traits.towers))
        visual = layout.rows(*VISUAL)
        attention = from_text(seen[self._asked(site.layer)]).masked_fill(~visual[:, None], 0)
        heads = self.heads if isinstance(self.heads, int) else round(self.heads * attention.shape[1])
        scores, paid = votes(attention, min(max(heads, 1), attention.shape[1]))
        wanted = (self.factor * paid).round().clamp(min=1, max=layout.shape[1]).long().tolist()  # the one wait
        counts = tuple(min(count, alive) for count, alive in zip(wanted, layout.visual))
        if counts == layout.visual:
            return None
        return layout.keeping(top_rows(scores, visual, counts), counts)

    def budgets(self, traits: Traits) -> list[list[int]]:
        """Patches of a picture that each encoder keeps behind each segment: for each encoder three counts."""
        tokens = torch.tensor([one.tokens or 0 for one in traits.towers])
        kept = [tokens]
        for segment in range(SEGMENTS):
            count = len(tokens)
            ranks = tokens if self.ranks is None else self.ranks[segment * count : (segment + 1) * count]
            wanted = torch.tensor(round(self.encoding ** (segment + 1) * int(tokens.sum())))
            kept.append(dealt(torch.as_tensor(ranks, dtype=torch.float64), wanted, kept[-1], kept[-1].clamp(max=1)))
        return torch.stack(kept[1:], dim=1).tolist()

    @staticmethod
    def _asked(layer: int) -> Rows:
        return Rows(Site("decoder", layer - 1), "question")

    def _encode(self, block: int, x: Tensor, layout: Layout, seen: Seen, traits: Traits) -> Edit | None:
        """Behind a segment of an encoder."""
        places = {end: (n, segment) for n, ends in enumerate(segments(traits)) for segment, end in enumerate(ends)}
        encoder, segment = places[block]
        counts = tuple(min(self.budgets(traits)[encoder][segment], alive) for alive in layout.visual)
        if counts == layout.visual:
            return None
        patches, attended = layout.rows(*VISUAL), seen.get(Rows(Site("encoder", block), "cls"))
        if attended is None:
            score = -likeness_to_mean(x, patches)
        else:
            score = attended.probabilities()[:, :, 0].mean(1)
            score = torch.nn.functional.pad(score, (layout.shape[1] - score.shape[1], 0))  # CLS itself may be left out
        return layout.keeping(top_rows(score, patches, counts), counts, "auto")

    def _fuse(self, x: Tensor, layout: Layout, encoders: int) -> Edit | None:
        """Before the language model."""
        picture_of = [pictures_of(items) for items in layout.items]
        pictures = max((max(of, default=-1) + 1 for of in picture_of), default=0)
        alive = [[0] * pictures for _ in picture_of]
        for mine, of, counts in zip(alive, picture_of, layout.alive):
            for picture, count in zip(of, counts):
                mine[picture] += count
        kept = [[min(max(round(self.fusion * count), 1), count) for count in of] for of in alive]
        if kept == alive:
            return None
        widest = max(map(len, picture_of))
        number, encoder = (
            upload([[*of, *[-1] * (widest - len(of))] for of in table], x.device).gather(1, layout.item.clamp(min=0))
            for table in (picture_of, [[item.encoder for item in items] for items in layout.items])
        )
        number = number.masked_fill(~layout.rows(*VISUAL), -1)
        chosen = top_of_groups(-redundancy(x, number, encoder, pictures, encoders), number, kept)
        return layout.keeping(chosen, tuple(map(sum, kept)), "auto")


def segments(traits: Traits) -> list[list[int]]:
    """The last block of each of the three segments of each of several encoders, counted over the blocks of all of them."""
    ends = [[round((one.feature_layer + 1) * (n + 1) / SEGMENTS) - 1 for n in range(SEGMENTS)] for one in traits.towers]
    return [[one.first + end for end in mine] for one, mine in zip(traits.towers, ends)]


def pictures_of(items: Sequence[Item]) -> list[int]:
    """The number of the picture that each item is of: one begins where its first encoder's grids begin."""
    first = [n == 0 or items[n - 1].encoder > item.encoder for n, item in enumerate(items)]
    return [begun - 1 for begun in accumulate(map(int, first))]
