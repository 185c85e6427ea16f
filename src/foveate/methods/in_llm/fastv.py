"""FastV: after a few layers of the language model, drop the visual tokens that the last prompt token ignores.

Paper: "An Image is Worth 1/2 Tokens After Layer 2", arXiv 2403.06764. The paper defines the score as the attention received
from all other tokens, every released variant uses the last token's row: the default is the code's reading, ``score="all"``
the paper's (each token's mean over the rows that can see it). Reconstructed: several images of a prompt are ranked jointly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from torch import Tensor

from foveate.core.budget import Budget, Rounding
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Keep
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Attention, Columns, Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.select import top_rows


def last_row_scores(attention: Attention) -> Tensor:
    """Head mean of the last prompt token's attention ``[B, K]``; the softmax is over the whole sequence."""
    return attention.probabilities()[:, :, -1].mean(1)


@register
@dataclass(frozen=True)
class FastV(Tokens):
    """Drop visual tokens before decoder layer ``layer`` by the attention of the layer before it."""

    name = "fastv"
    title = "FastV"
    group = "in_llm"
    paper = "arXiv 2403.06764"
    helps = "As the plainest method in the LLM: it reads one row of attention. Others are measured against it."
    needs = ("decoder attention row (1 layer)",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    layer: Annotated[int, AtLeast(1)] = 2
    """Decoder layer before which tokens are dropped, counted from 0: those before it run on all tokens."""
    keep: Annotated[int | float, Keep()] = 0.5
    """Visual tokens that are left of a sample, all of its pictures together."""
    score: Literal["last", "all"] = "last"
    """Attention of the last prompt token (``"last"``), or the mean over all rows that see a token (``"all"``)."""
    rounding: Rounding = "round"
    """How a share becomes a count."""

    def budget(self) -> Budget:
        """Visual tokens to keep of each sample."""
        return Budget(self.keep, self.rounding)

    def check(self, traits: Traits) -> str | None:
        """The layer must exist."""
        if self.layer >= traits.decoder_layers:
            return f"layer={self.layer}: must be in 1..{traits.decoder_layers - 1}"
        return None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The input of layer ``layer``."""
        return (Site("decoder", self.layer),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention of the layer before."""
        site = Site("decoder", self.layer - 1)
        return (Rows(site) if self.score == "last" else Columns(site),)

    def workspace(self, shape: Shape) -> int:
        """The rows of attention that are ranked by."""
        if self.score == "last":
            return shape.edits + shape.attention(1)
        return shape.edits + shape.attention(CHUNK) + 2 * shape.masks

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Rank the visual rows of each sample jointly."""
        counts = tuple(self.budget().of(count) for count in layout.visual)
        if counts == layout.visual:
            return None
        (observed,) = seen.values()
        scores = last_row_scores(observed) if self.score == "last" else observed
        return layout.keeping(top_rows(scores, layout.rows(*VISUAL), counts), counts)
