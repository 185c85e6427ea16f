"""DivPrune: the visual tokens that lie as far from each other as possible.

Paper: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models", arXiv 2503.02175. Starts with the most
isolated token, then always takes the one whose nearest chosen token is farthest, by cosine: the usual greedy for max-min
diversity (the paper calls it exact). All visual tokens of a prompt are one pool, as the released code flattens the tiles of
a picture. Differs from it: a chosen token leaves the candidates, as in the paper's Algorithm 1 (the code may take a copy of
it again and again); line ends of LLaVA-NeXT always stay (there they take part); distances are float32. Reconstructed:
several pictures of a prompt are one pool, too (the code looks at the first).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from foveate.core.budget import Budget, Rounding
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Keep
from foveate.core.positions import Positions
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.farthest import spread_out


@register
@dataclass(frozen=True)
class DivPrune(Tokens):
    """Greedy max-min diversity of the projected tokens, or of hidden states before decoder layer ``layer``."""

    name = "divprune"
    title = "DivPrune"
    group = "before_llm"
    paper = "arXiv 2503.02175"
    helps = "Any question and any encoder: neither attention nor the question is read; what stands alone is not lost."
    needs = ("projected tokens",)
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.098
    """Visual tokens that are left of a sample, all of its pictures together."""
    layer: Annotated[int, AtLeast(0)] = 0
    """Decoder layer before which tokens are dropped; 0 = before the language model, as in all that the paper reports."""
    rounding: Rounding = "round"
    """How a share becomes a count."""
    positions: Positions = "auto"
    """Rotary positions of what stays: ``"contiguous"`` (as if the prompt had been short), ``"anchor"`` (their own),
    ``"rank"`` (as if the grid had been smaller), or contiguous where positions are one row, else their own (``"auto"``)."""

    def check(self, traits: Traits) -> str | None:
        """The layer must exist; contiguous positions have no meaning under M-RoPE."""
        return traits.refuse_layers("layer", self.layer, least=0) or traits.refuse_positions(self.positions)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Where the tokens enter the language model, or later."""
        return (Site("decoder", self.layer) if self.layer else Site("sequence"),)

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, as given and once more, and their distances."""
        return shape.edits + 3 * shape.floats(shape.hidden) + 3 * shape.pairs

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt; the budget is a share of the tokens that it came with."""
        budget = Budget(self.keep, self.rounding)
        counts = tuple(min(budget.of(there), alive) for there, alive in zip(layout.originals, layout.visual))
        if counts == layout.visual:
            return None
        rows = last_of(layout.rows(*VISUAL), max(layout.visual))
        return layout.keeping(spread_out(x, rows, counts), counts, self.positions)
