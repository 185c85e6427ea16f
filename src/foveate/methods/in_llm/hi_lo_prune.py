"""Hi-Lo Prune: tokens with unlike pixels, and among these some of unlike meaning; what goes is first looked at once more.

Paper: "Look at What You'll Lose before Pruning with Hierarchical Token Selection", CVPR 2026, no arXiv id. Reconstructed
from public notes; no code is public. Tokens that the coarse step finds and the fine one drops are *candidates*. In the
layers before the cut all other rows attend to them more (*prune-aware fusion*), so that they take in what is about to go:
where a candidate has more than a threshold of a row's attention and is among its largest keys, ``fusion`` times its logit is
added to the logit. Attention stays fused; the added numbers are made for some queries at a time. The notes name no values:
factor, threshold (as a multiple of an even share) and number of keys are our choice; keys that equal the last of the largest
count, too. The budgets of the paper's several cuts are not known, so there is one cut. Our reading: each greedy step begins
with the first token, pixels are those of one token as the encoder gets them (of a video's paired frames the first), and
every grid is on its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.items import ItemBatch, ItemTokens
from foveate.core.layout import Edit, Layout
from foveate.core.leaning import Leaning
from foveate.core.parameters import AtLeast, In
from foveate.core.positions import Positions
from foveate.core.ranking import about, ranked
from foveate.core.registry import register
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Pixels, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.farthest import farthest_first
from foveate.ops.select import mask_of

Start = Literal["first", "isolated"]
Among = Literal["all", "candidates"]
Boost = Literal["logit", "magnitude"]
CHOSEN, CANDIDATES, ALIVE = "hi_lo_prune", "hi_lo_prune candidates", "hi_lo_prune alive"
"""Keys of the rows that stay at the cut, of those looked at once more before they go, and of how many there were of each
grid when they were chosen, and are to stay."""


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


def fused(
    logits: Tensor,
    candidates: Tensor,
    factor: float,
    threshold: float,
    share: float,
    among: Among = "all",
    boost: Boost = "logit",
) -> Tensor:
    """What is added to the logits of candidates that a row looks at anyway: ``factor`` times themselves, else 0.

    Args:
        logits: ``[B, H, q, K]``, -inf where a row does not see a key.
        candidates: ``[B, 1, q, K]`` bool, or what broadcasts to it: keys that may get more of a row.
        factor: of the logit.
        threshold: least weight, as a multiple of one by the number of keys that the row sees.
        share: of the keys that it sees, rounded up: so many, the largest, may get more.
        among: whether these are the largest of all keys, or of the candidates.
        boost: adds to the logit, which makes a negative one smaller, or its magnitude.

    Returns:
        ``[B, H, q, K]``.
    """
    seen = logits > float("-inf")
    weight = torch.softmax(logits.masked_fill(~seen, torch.finfo(logits.dtype).min), dim=-1)
    ranking = logits if among == "all" else logits.masked_fill(~candidates, float("-inf"))
    most = ((ranking > float("-inf")).sum(-1, keepdim=True) * share).ceil().long().clamp(min=1)
    largest = ranking.topk(max(math.ceil(share * logits.shape[-1]), 1), dim=-1).values
    last = largest.gather(-1, most.clamp(max=largest.shape[-1]) - 1)
    more = candidates & seen & (weight * seen.sum(-1, keepdim=True) > threshold) & (logits >= last)
    return torch.where(more, factor * (logits.abs() if boost == "magnitude" else logits), 0.0)


@register
@dataclass(frozen=True)
class HiLoPrune(ItemTokens, Leaning):
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
    fusion: Annotated[float, AtLeast(0)] = 0.5
    """Share of its own logit that is added to that of a candidate, in the layers before ``layer``; 0 = none; our choice."""
    threshold: Annotated[float, AtLeast(0)] = 1.0
    """Least attention of a row to a candidate that gets more, as a multiple of an even share of all keys; our choice."""
    share: Annotated[float, In(0, 1)] = 0.1
    """Share of a row's keys, those with the largest logits, that may get more; our choice."""
    among: Among = "all"
    """Whether these are the largest of all keys that a row sees, or of the candidates."""
    boost: Boost = "logit"
    """Whether a negative logit gets more negative, as the formula has it, or larger by its magnitude."""
    positions: Positions = "anchor"

    def check(self, traits: Traits) -> str | None:
        """Needs pixels, a layer that exists, and attention to add to."""
        if traits.cell is None:
            return f"needs the pixels of each token, which {traits.family} does not offer; use divprune"
        recurrent = sorted(set(self.leaned(traits)) & set(traits.recurrent))
        if recurrent:
            return f"fusion={self.fusion}: layers {recurrent} are recurrent and have no attention to add to; use fusion=0"
        return traits.refuse_layers("layer", self.layer, least=0) or super().check(traits)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Where tokens are chosen, and where the others go."""
        return (Site("sequence"), *((Site("decoder", self.layer),) if self.layer else ()))

    def leaned(self, traits: Traits) -> tuple[int, ...]:
        """The layers before the cut."""
        return tuple(range(self.layer if self.fusion and self.candidates else 0))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Pixels."""
        return (Pixels(),)

    def workspace(self, shape: Shape) -> int:
        """Pixels as given, by picture, as float32 and at length 1; tokens likewise; distances; some rows of attention."""
        pixels = 4 * shape.floats(shape.images * shape.image_rows * shape.cell * shape.itemsize)
        leaning = 3 * shape.attention(CHUNK) if self.fusion and self.layer else 0
        return super().workspace(shape) + pixels + 4 * shape.floats(shape.hidden) + 3 * shape.pairs + leaning

    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Coarse to fine, then raster order."""
        return self._choose(images, k)[0].sort(dim=1).values

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Choose, and remember the choice until the cut."""
        if site.kind == "sequence":
            if self.layer == 0:
                return super().edit(site, x, layout, seen, state)
            self._remember(x, layout, seen, state)
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

    def bias(self, layer: int, logits: Tensor, rows: slice, layout: Layout, seen: Seen, state: State) -> Tensor | None:
        """All rows but candidates attend more to candidates."""
        marked = state.get("prefill", CANDIDATES)
        if marked is None:
            return None
        candidates = (marked > 0) & layout.rows(*VISUAL)
        earlier = logits.shape[3] - candidates.shape[1]
        keys = torch.nn.functional.pad(candidates, (earlier, 0))[:, None, None]
        pairs = keys & ~candidates[:, None, rows, None]
        return fused(logits, pairs, self.fusion, self.threshold, self.share, self.among, self.boost)

    def _choose(self, images: ItemBatch, k: int) -> tuple[Tensor, Tensor]:
        """What stays and what was found, in the order of choice."""
        (pixels,) = images.seen.values()
        coarse = min(k + round(self.candidates * images.rows * images.columns), images.count)
        return coarse_to_fine(pixels, images.x, k, coarse, self.start)

    def _remember(self, x: Tensor, layout: Layout, seen: Seen, state: State) -> None:
        """Choose, for later."""
        kept_of = self.budgets(layout)
        if kept_of is None:
            return
        chosen, found = torch.zeros_like(layout.valid), torch.zeros_like(layout.valid)
        for sample, where, images, k in self.batches(x, layout, seen, state, kept_of):
            with about(sample, where, layout.shape):
                kept, coarse = self._choose(images, k)
            found[sample[:, None], where.gather(1, coarse)] = True
            chosen[sample[:, None], where.gather(1, kept)] = True
        edit = self.keeping(chosen, layout, kept_of)
        stays = mask_of(edit.reduction.anchor, layout.shape[1])
        state.put("prefill", CHOSEN, stays.float(), rows=True)
        state.put("prefill", ALIVE, (layout.alive, edit.visual, edit.by_item))
        if self.fusion and self.candidates:
            state.put("prefill", CANDIDATES, (found & ~stays).float(), rows=True)
