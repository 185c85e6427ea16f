"""Hi-Lo Prune: tokens with unlike pixels, and among these some of unlike meaning; the early layers still see all.

Paper: "Look at What You'll Lose before Pruning with Hierarchical Token Selection", CVPR 2026, no arXiv id. Reconstructed
from public notes; no code is public. This is the selection, with its single cut, and every figure of the paper has more in
it: its *prune-aware fusion* is not here. In the layers before the cut that raises, by a factor of the logit itself, what all
rows but the candidates (found by the coarse step, dropped by the fine one) attend to candidates, where the weight is above a
threshold and among a row's largest. It is missing because an edit's bias (`Edit.key_bias`) is one number for each key and
ends with the encoder, while this depends on the pair of row and key; no protocol lets a method take the place of a decoder
layer's attention. Factor, threshold and number of keys are not known either. Nor are the budgets of its several cuts, which
are not here. Our reading: each greedy step begins with the first token, pixels are those of one token as the encoder gets
them (of a video's paired frames the first), and every grid is on its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.layout import Edit, Layout
from foveate.core.parameters import AtLeast, In
from foveate.core.positions import Positions
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Pixels, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.farthest import farthest_first

Start = Literal["first", "isolated"]
CHOSEN, ALIVE = "hi_lo_prune", "hi_lo_prune alive"
"""Keys of the rows that stay at the cut, and of how many there were of each grid when they were chosen, and are to stay."""


def coarse_to_fine(pixels: Tensor, tokens: Tensor, k: int, coarse: int, start: Start = "first") -> tuple[Tensor, Tensor]:
    """Farthest-first traversal by pixels, then, among what it found, by meaning.

    Args:
        pixels: ``[I, n, P]``, compared by cosine.
        tokens: ``[I, n, D]``, the same.
        k: tokens to keep.
        coarse: tokens that the first step finds, at least k.
        start: each step begins with the first token, or with the most isolated.

    Returns:
        ``[I, k]`` the tokens that stay and ``[I, coarse]`` those found first, both in the order of choice.
    """
    begin = torch.zeros(len(pixels), dtype=torch.long, device=pixels.device) if start == "first" else None
    found = farthest_first(pixels, coarse, begin)
    among = found.sort(dim=1).values
    fine = farthest_first(tokens.gather(1, among[..., None].expand(-1, -1, tokens.shape[2])), k, begin)
    return among.gather(1, fine), found


@register
@dataclass(frozen=True)
class HiLoPrune(ItemTokens):
    """Choose before the language model, coarse to fine; drop the rest before decoder layer ``layer``."""

    name = "hi_lo_prune"
    title = "Hi-Lo Prune"
    group = "in_llm"
    paper = "CVPR 2026"
    helps = "Few tokens and any question: what differs to the eye is not lost, and no attention is read."
    needs = ("pixels of each token",)
    # The cut comes later than the choice, so a prompt must come in one forward.
    asks = True

    keep: int | float = 0.2
    layer: Annotated[int, AtLeast(0)] = 2
    """Decoder layer before which tokens are dropped, counted from 0; 0 = before the language model."""
    candidates: Annotated[float, In(0, 1)] = 0.3
    """Tokens that the coarse step finds beyond ``keep``, as a share of the grid; 0 = pixels alone decide, 1 = meaning."""
    start: Start = "first"
    """What each greedy step begins with: the first token, or the most isolated one, as DivPrune does."""
    positions: Positions = "anchor"

    def check(self, traits: Traits) -> str | None:
        """Needs pixels, and a layer that exists."""
        if traits.cell is None:
            return f"needs the pixels of each token, which {traits.family} does not offer; use divprune"
        return traits.refuse_layers("layer", self.layer, least=0) or super().check(traits)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Where tokens are chosen, and where the others go."""
        return (Site("sequence"), *((Site("decoder", self.layer),) if self.layer else ()))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Pixels."""
        return (Pixels(),)

    def workspace(self, shape: Shape) -> int:
        """Pixels as given, by picture, as float32 and at length 1; tokens likewise; distances."""
        pixels = 4 * shape.floats(shape.images * shape.image_rows * shape.cell * shape.itemsize)
        return super().workspace(shape) + pixels + 4 * shape.floats(shape.hidden) + 3 * shape.pairs

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Coarse to fine, then raster order."""
        (pixels,) = images.seen.values()
        coarse = min(k + round(self.candidates * images.rows * images.columns), images.count)
        return coarse_to_fine(pixels, images.x, k, coarse, self.start)[0].sort(dim=1).values

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Choose, and remember the choice until the cut."""
        if site.kind == "sequence":
            edit = super().edit(site, x, layout, seen, state)
            if edit is None or self.layer == 0:
                return edit
            anchor, total = edit.reduction.anchor, layout.shape[1]
            chosen = torch.zeros(len(x), total + 1, device=x.device)
            chosen = chosen.scatter(1, anchor.masked_fill(anchor < 0, total), 1.0)[:, :total]
            state.put("prefill", CHOSEN, chosen, rows=True)
            state.put("prefill", ALIVE, (layout.alive, edit.visual, edit.by_item))
            return None
        chosen = state.get("prefill", CHOSEN)
        if chosen is None:
            return None
        alive, visual, by_item = state.get("prefill", ALIVE)
        # What was ranked by is not about the rows that are here: what can be shown is who was chosen.
        mask = (ranked(chosen) > 0) & layout.rows(*VISUAL)
        if layout.alive != alive:
            # Somebody else dropped some in between: how many of ours are left is known on the device alone.
            visual, by_item = tuple(mask.sum(1).tolist()), None
        return layout.keeping(mask, visual, self.positions, by_item=by_item)
