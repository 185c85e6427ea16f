"""BTP: early stages keep tokens unlike each other, later ones what the last prompt token attends to, and then all leave.

Paper: "Balanced Token Pruning: Accelerating Vision Language Models Beyond Local Optimization", arXiv 2505.22038. As the
released code of LLaVA-1.5; ``preset="qwen"`` is that of Qwen2.5-VL-7B. The paper finds the stages' layers by calibration and
does not say how: they are parameters here. Differs from the code: where the first stage's three sets are more than its
budget, the last diverse ones go (the code keeps all), and a token that two sets hold counts once (the code of stage 2 lists
it twice). Reconstructed: other depths get their stages at the same shares of it; all pictures of a prompt are one sequence,
but each grid has a spatial set of its own; stages behind the third go by attention alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Annotated, Literal, NamedTuple, Self

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import Layers, Shares
from foveate.core.ranking import about
from foveate.core.registry import register
from foveate.core.roles import VISUAL, last_of
from foveate.core.shape import Shape
from foveate.core.signal import Rows, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.farthest import farthest_first
from foveate.ops.select import first_rows, mask_of, top_k

NEVER = torch.iinfo(torch.long).max


class Mix(NamedTuple):
    """What a stage takes, as shares of its budget: so many diverse tokens, and so many of the ``surplus`` times as many
    tokens with the best attention: the ``balanced`` ones, or, if not, all of these.
    """

    diverse: float
    attended: float
    surplus: float
    balanced: bool = True

    def counts(self, k: int) -> tuple[int, int, int]:
        """Diverse ones, attended ones, and the attended ones that they are chosen among."""
        attended = int(self.attended * k)
        among = int(self.surplus * attended)
        return int(self.diverse * k), attended if self.balanced else among, among


class Preset(NamedTuple):
    """Published stages: layers of so many, shares that stay, what the stages take, and the spatial set's share of a grid."""

    layers: tuple[int, ...]
    depth: int
    ratios: tuple[float, ...]
    mixes: tuple[Mix, ...]
    spatial: int | float


PRESETS = {
    "llava": Preset(
        (3, 6, 14, 22), 32, (1 / 2, 1 / 2, 1 / 3, 0.0), (Mix(0.3, 0.3, 3.7), Mix(0.1, 0.9, 1.5), Mix(0, 1, 1.2)), 1 / 4
    ),
    "qwen": Preset(
        (3, 6, 15, 22), 28, (1 / 2, 1 / 2, 1 / 2, 0.0), (Mix(0, 0.1, 1.2, False), Mix(0, 0.4, 1, False), Mix(0, 1, 1.2)), 0
    ),
}


@cache
def spread_cells(rows: int, columns: int, count: int) -> tuple[int, ...]:
    """``count`` cells of a grid far from each other (Manhattan distance), from the first on, in the order of choice."""
    cells = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).reshape(1, -1, 2)
    order = farthest_first(cells, count, first=torch.tensor([0]), metric="manhattan") if count else cells[:, :0, 0]
    return tuple(order[0].tolist())


def balanced(scores: Tensor, among: Tensor, front: Tensor) -> Tensor:
    """All tokens in the order in which they are taken: of the best ones those in front, then the others, then the rest.

    Args:
        scores: ``[B, N]``, -inf where there is none.
        among: ``[B]`` how many count as the best.
        front: ``[B]`` first index that is not in front.

    Returns:
        ``[B, N]`` indices.
    """
    order = top_k(scores, scores.shape[1])
    best = torch.arange(scores.shape[1], device=scores.device) < among[:, None]
    tier = torch.where(best, (order >= front[:, None]).long(), 2)
    return order.gather(1, tier.sort(dim=1, stable=True).indices)


def turns(order: Tensor, counts: Sequence[int], width: int) -> Tensor:
    """``[B, width]`` place of each token among the first ``counts[b]`` of ``order`` ``[B, k]``; `NEVER` for others."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    place = place.masked_fill(place >= upload(counts, order.device)[:, None], NEVER)
    return place.new_full((len(order), width), NEVER).scatter_reduce(1, order, place, "amin")


@register
@dataclass(frozen=True)
class BTP(Tokens):
    """Keep ``ratios`` of the visual tokens still there before each of ``layers``; from stage to stage fewer diverse ones."""

    name = "btp"
    title = "BTP"
    group = "in_llm"
    paper = "arXiv 2505.22038"
    helps = "Prompts whose deep layers need more than the shallow ones attend to: what is kept early covers the picture."
    needs = ("decoder attention row (1 layer for each stage)", "hidden states (1 layer for each stage)")
    identity_at = {"layers": (1,), "ratios": (1.0,)}  # noqa: RUF012

    layers: Annotated[tuple[int, ...], Layers()] | None = None
    """Decoder layers, counted from 0, before which tokens are dropped; None = 3, 6, 14 and 22 of 32 (``"llava"``), or 3, 6,
    15 and 22 of 28 (``"qwen"``)."""
    ratios: Annotated[tuple[float, ...], Shares()] | None = None
    """Share that stays before each of them, of a sample's current count; None = 1/2, 1/2, 1/3 (``"qwen"``: 1/2) and 0."""
    preset: Literal["llava", "qwen"] = "llava"
    """What the stages take: of LLaVA-1.5, spread over the grid at first and balanced between the front of the pictures and
    the rest; or of Qwen2.5-VL, few attended tokens at first and the rest diverse."""

    def fitted(self, traits: Traits) -> Self:
        """The preset's stages at the same shares of the depth."""
        preset = PRESETS[self.preset]
        layers = traits.same_depth(preset.layers, of=preset.depth) if self.layers is None else self.layers
        return replace(self, layers=layers, ratios=preset.ratios if self.ratios is None else self.ratios)

    def check(self, traits: Traits) -> str | None:
        """A share for each layer, and attention before it."""
        fit = self.fitted(traits)
        layers, ratios = fit.layers or (), fit.ratios or ()
        if len(layers) != len(ratios):
            return f"ratios={ratios}: must be one for each of layers={layers}"
        return traits.refuse_layers("layers", layers, attention=[layer - 1 for layer in layers])

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The inputs of the stages' layers."""
        return tuple(Site("decoder", layer) for layer in self.fitted(traits).layers or ())

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention of the layers before."""
        return tuple(Rows(Site("decoder", site.layer - 1)) for site in self.sites(traits))

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, as given and once more, their distances, and a row of attention."""
        return shape.edits + 3 * shape.floats(shape.hidden) + 3 * shape.pairs + shape.attention(1)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One pool for each prompt."""
        stage = (self.layers or ()).index(site.layer)
        ratio = (self.ratios or ())[stage]
        counts = tuple(Budget(ratio, "floor").of(alive) if ratio else 0 for alive in layout.visual)
        if counts == layout.visual:
            return None
        if not any(counts):
            return layout.keeping(torch.zeros_like(layout.valid), counts)
        rows = last_of(layout.rows(*VISUAL), max(layout.visual))
        index = rows.clamp(min=0)
        with about(torch.arange(len(x), device=x.device), index, layout.shape):
            logits = seen[Rows(Site("decoder", site.layer - 1))].logits[:, :, -1].mean(1).gather(1, index)
            # A token that the last row does not see (sliding attention) still goes before padding.
            logits = logits.clamp(min=torch.finfo(logits.dtype).min).masked_fill(rows < 0, float("-inf"))
            chosen = self._choose(stage, x, rows, logits, layout, counts)
        return layout.keeping(chosen, counts)

    def _choose(
        self, stage: int, x: Tensor, rows: Tensor, logits: Tensor, layout: Layout, counts: tuple[int, ...]
    ) -> Tensor:
        """Mask ``[B, N]`` of ``counts[b]`` of the ``rows`` ``[B, V]`` (-1 = padding), scored by ``logits`` ``[B, V]``."""
        preset = PRESETS[self.preset]
        mix, width = preset.mixes[min(stage, len(preset.mixes) - 1)], rows.shape[1]
        diverse, attended, among = zip(*map(mix.counts, counts))
        # Padding stands in front of the rows of shorter prompts, where the front of the pictures begins.
        front = [width - alive + k for alive, k in zip(layout.visual, counts)]
        best = balanced(logits, upload(among, x.device), upload(front, x.device)) if mix.balanced else top_k(logits, width)
        sets = [turns(best, attended, width)]
        if preset.spatial and stage == 0:
            sets.append(self._spatial(rows, layout, preset.spatial))
        points = x.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, x.shape[2]))
        if any(diverse):
            sets.append(turns(farthest_first(points, max(diverse), valid=rows >= 0), diverse, width))
        # All of one set go before those of the next.
        turn = torch.stack([one.where(one == NEVER, one + number * width) for number, one in enumerate(sets)]).amin(0)
        own = torch.arange(width, device=x.device).expand_as(rows)
        first = first_rows(turn.argsort(dim=1, stable=True), own, counts, width) & (turn < NEVER)
        missing = max(k - max(few) for k, *few in zip(counts, diverse, attended))
        if missing > 0:
            more = farthest_first(points, missing, valid=rows >= 0, taken=first)
            first = first | first_rows(more, own, upload(counts, x.device) - first.sum(1), width)
        return mask_of(rows.masked_fill(~first, -1), layout.shape[1])

    def _spatial(self, rows: Tensor, layout: Layout, share: float) -> Tensor:
        """``[B, V]`` turn of each of ``rows`` in the spatial set of its grid, `NEVER` where it is none of it."""
        grids = [item for items in layout.items for item in items]
        shape = len(rows), max(map(len, layout.items)), max(grid.count for grid in grids)
        table = torch.full(shape, NEVER)
        for sample, items in enumerate(layout.items):
            for number, grid in enumerate(items):
                cells = spread_cells(grid.rows, grid.columns, int(share * grid.count))
                table[sample, number, list(cells)] = torch.arange(len(cells))
        of, index = torch.arange(len(rows), device=rows.device)[:, None], rows.clamp(min=0)
        item, ordinal = layout.item.gather(1, index), layout.ordinal.gather(1, index)
        return upload(table, rows.device)[of, item, ordinal].masked_fill(rows < 0, NEVER)
