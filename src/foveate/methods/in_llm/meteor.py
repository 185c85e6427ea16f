"""METEOR (its last stage): keep as many visual tokens as the heads that look at the picture ask for.

Paper: "METEOR: Multi-Encoder Collaborative Token Pruning for Efficient Vision Language Models", ICCV 2025, arXiv 2507.20842.
No code is public; reconstructed from public notes with its formulas. The attention that text behind the picture pays to the
visual tokens, summed, is a head's visual attention value. The heads with the largest ones vote: how much they pay in all,
times a factor, is the number of tokens that stay, so questions that need detail (text in the picture) keep more, and those
tokens stay that they attend to most. The paper uses this stage alone on models as they are, too. Left out: the stages
before, which divide a budget among several vision encoders and compare their tokens; no family here has several.
Reconstructed: the mean over the text's rows, softmax over all keys, the layer, the number of heads and the factor (the notes
name none): ``factor`` = wanted tokens / mean of what the heads pay, over prompts of one's own. Original positions.

The count depends on the data: it comes to the host once for each forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

from torch import Tensor

from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, CountOrShare
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.select import top_k, top_rows


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


@register
@dataclass(frozen=True)
class Meteor(Tokens):
    """Drop visual tokens before one layer, as many as its heads' attention to the picture leaves room for."""

    name = "meteor"
    title = "METEOR"
    group = "in_llm"
    paper = "arXiv 2507.20842"
    helps = "Questions that differ in how much they ask of the picture: each has as many tokens as it pays attention to."
    needs = ("decoder attention rows of the question (1 layer)",)
    identity_at = {"factor": 1e9}  # noqa: RUF012

    factor: Annotated[float, AtLeast(0)] = 100.0
    """Tokens that stay for each whole row of attention that the heads pay to the picture, at least one token; our choice."""
    heads: Annotated[int | float, CountOrShare("heads")] = 0.25
    """Heads that vote: a number, or a share of all of them, at least one; our choice."""
    layer: Annotated[int, AtLeast(1)] | None = None
    """Decoder layer before which tokens are dropped, by the attention of the one before; None = a third of the depth."""

    def fitted(self, traits: Traits) -> Self:
        """The layer at a third of the depth."""
        return replace(self, layer=self.layer or max(1, traits.decoder_layers // 3))

    def check(self, traits: Traits) -> str | None:
        """The layer must exist, and the one before it attend."""
        layer = self.fitted(traits).layer or 1
        return traits.refuse_layers("layer", layer, attention=[layer - 1])

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of the layer."""
        return (Site("decoder", self.fitted(traits).layer or 1),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """What the question attends to in the layer before."""
        return (Rows(Site("decoder", (self.fitted(traits).layer or 1) - 1), "question"),)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How many tokens attention is worth."""
        return {"factor": Range(10.0, 1000.0, log=True)}

    def workspace(self, shape: Shape) -> int:
        """Attention of the question, of which all that is not visual may be part."""
        return shape.edits + 2 * shape.attention(max(shape.rows - shape.visual, 1))

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the visual rows of each sample jointly."""
        (asked,) = seen.values()
        visual = layout.rows(*VISUAL)
        attention = from_text(asked).masked_fill(~visual[:, None], 0)
        heads = self.heads if isinstance(self.heads, int) else round(self.heads * attention.shape[1])
        scores, paid = votes(attention, min(max(heads, 1), attention.shape[1]))
        wanted = (self.factor * paid).round().clamp(min=1, max=layout.shape[1]).long().tolist()  # the one wait
        counts = tuple(min(count, alive) for count, alive in zip(wanted, layout.visual))
        if counts == layout.visual:
            return None
        return layout.keeping(top_rows(scores, visual, counts), counts)
