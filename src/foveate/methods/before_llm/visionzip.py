"""VisionZip: tokens that the encoder attends to stay, and a few targets among the others take up all that is left.

Paper: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", arXiv 2412.04467. Where the encoder has a
CLS token and rows can go before the projector, as the published code for LLaVA-1.5: dominant tokens by the attention of CLS,
which goes to the language model itself, as the first token; contextual tokens come last. Elsewhere as LightCompress reads it
for Qwen2.5-VL: on the language model's input embeddings, contextual tokens at their targets' places, by the attention that
tokens receive where there is no CLS. A contextual token is its target *plus* the mean of what joins it, as in the code (the
paper speaks of merging). Reconstructed: one number is the budget, of which contextual tokens have the published share. Of
LLaVA-NeXT each grid has one budget and stays in raster order with its line ends (the code: each tile; no line ends, and CLS
and contextual tokens at the end). The tuned projector is not part of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import CountOrShare, Keep
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.shape import INDEX, Shape
from foveate.core.signal import Attention, Columns, Keys, Rows, Seen, Signal, Site, Summary
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.select import top_rows

Place = Literal["features", "embeddings"]


@dataclass(frozen=True)
class Zipped:
    """What becomes of tokens ``[I, N]``.

    Attributes:
        dominant, contextual: masks of those that stay: as they are, and as targets of others.
        rank: number of each contextual token among those of its image.
        joins: the token that each one goes to: itself, if it stays; -1 where it is lost.
        weight: with which it does.
    """

    dominant: Tensor
    contextual: Tensor
    rank: Tensor
    joins: Tensor
    weight: Tensor

    def reduction(self, counts: Sequence[int], summary: Tensor | None = None, raster: bool = False) -> Reduction:
        """Dominant tokens in raster order, then contextual ones by rank (``raster``: at their own places).

        Args:
            counts: rows that come out of each image.
            summary: ``[I, 1]`` tokens that do not stay, at whose place a first row comes in that nothing goes to; -1 = none.
            raster: whether all that stays keeps its order.
        """
        (_, tokens), width, device = self.joins.shape, max(counts), self.joins.device
        place = torch.arange(tokens, device=device).expand_as(self.joins)
        last = place if raster else tokens + self.rank
        key = torch.where(self.dominant, place, torch.where(self.contextual, last, 3 * tokens))
        if summary is not None:
            there = summary.clamp(min=0)
            key = key.scatter(1, there, torch.where(summary < 0, key.gather(1, there), -1))
        ranked = key.sort(dim=1, stable=True).indices
        slot = torch.zeros_like(ranked).scatter(1, ranked, place)
        assignment = slot.gather(1, self.joins.clamp(min=0)).masked_fill(self.joins < 0, -1)
        padding = torch.arange(width, device=device) >= upload(tuple(counts), device)[:, None]
        return Reduction.merging(assignment, self.weight, ranked[:, :width].masked_fill(padding, -1))


def zipped(
    score: Tensor,
    keys: Tensor,
    valid: Tensor,
    alive: Sequence[int],
    dominant: Sequence[int],
    contextual: Sequence[int],
    pool: int | None = None,
) -> Zipped:
    """Dominant tokens by score, and evenly spaced targets that the others join by the cosine of their keys.

    Args:
        score: ``[I, N]`` attention.
        keys: ``[I, N, d]``.
        valid: ``[I, N]`` tokens that are not padding: ``alive`` of each image.
        alive: as above.
        dominant: tokens to keep of each image as they are.
        contextual: targets of each image, no more than are left.
        pool: so many times the targets, the best by score, are what targets and their members come from, in that order, and
            all else is lost (DUET-VLM); None = all that is left, in raster order.
    """
    images, tokens = score.shape
    rest_of = [n - d for n, d in zip(alive, dominant)]
    pool_of = rest_of if pool is None else [min(pool * c, n) for c, n in zip(contextual, rest_of)]
    steps = [max(1, p // max(c, 1)) for p, c in zip(pool_of, contextual)]
    sizes = upload([dominant, contextual, pool_of, steps], score.device)[..., None]
    place = torch.arange(tokens, device=score.device).expand(images, -1)
    first = top_rows(score, valid, dominant)
    rest = valid & ~first
    if pool is None:
        number = rest.long().cumsum(1) - 1
    else:
        best = score.masked_fill(~rest, float("-inf")).sort(dim=1, descending=True, stable=True).indices
        number = torch.zeros_like(best).scatter(1, best, place)
    pooled = rest & (number < sizes[2])
    rank = number.div(sizes[3], rounding_mode="floor")
    target = pooled & (number % sizes[3] == 0) & (rank < sizes[1])

    width = max(contextual)
    joins = torch.where(first | target, place, -1)
    weight = torch.ones_like(score, dtype=torch.float32)
    if not width:
        return Zipped(first, target, rank, joins, weight)
    targets = torch.where(target, rank, tokens).sort(dim=1, stable=True).indices[:, :width]
    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    similarity = unit @ unit.gather(1, targets[..., None].expand(-1, -1, unit.shape[2])).mT
    none = torch.arange(width, device=score.device) >= sizes[1]
    nearest = similarity.masked_fill(none[:, None], float("-inf")).argmax(2)
    members = pooled & ~target
    of_target = weight.new_zeros(images, width).scatter_add(1, nearest, members.float())
    return Zipped(
        first,
        target,
        rank,
        torch.where(members, targets.gather(1, nearest), joins),
        torch.where(members, 1 / of_target.gather(1, nearest).clamp(min=1), weight),
    )


def on_features(place: Place | None, traits: Traits) -> bool:
    """Whether to work on features: wherever there is CLS, and tokens are rows of what the projector is fed."""
    possible = traits.has_cls and traits.refuse_sites("encoder", "pre_projector") is None
    return possible if place is None else place == "features"


def refuse_place(place: Place | None, traits: Traits) -> str | None:
    """Why a model cannot host it: both forms need the encoder's attention, the published one CLS and its features."""
    if traits.encoder_layers is None:
        return f"needs encoder attention, which is not available on {traits.family}; use divprune, uniform or random"
    if place == "features" and not on_features(None, traits):
        return f"place='features': {traits.family} offers no CLS token beside features that are tokens; use 'embeddings'"
    return None


def reads_of(traits: Traits, features: bool) -> tuple[Signal, ...]:
    """Attention and keys of the block that makes the features, and CLS beside them if ``features`` are worked on."""
    site = Site("encoder", traits.feature_layer or 0)
    read = (Rows(site, "cls") if traits.has_cls else Columns(site), Keys(site))
    return (*read, Summary()) if features else read


def salience(attention: Attention | Tensor) -> Tensor:
    """``[I, N]`` attention of CLS, summed over heads, or attention received."""
    return attention.probabilities().sum(1)[:, 0] if isinstance(attention, Attention) else attention


def edit_of(splits: Sequence[tuple[int, int]], x: Tensor, layout: Layout, seen: Seen, pool: int | None = None) -> Edit:
    """The edit of each grid's tokens to so many dominant (CLS counted, where it was read) and contextual ones.

    ``seen`` is of `reads_of`, in its order; ``pool`` is that of `zipped`.
    """
    attention, keys, *cls = seen.values()
    score, summary = salience(attention), cls[0] if cls else None
    counts = tuple(map(sum, splits))
    # A grid that keeps all has no token whose place CLS could take.
    dominant = [d - (summary is not None and d + c < n) for (d, c), n in zip(splits, layout.visual)]
    made = zipped(score, keys, layout.valid, layout.visual, dominant, [c for _, c in splits], pool)
    if summary is not None:
        return with_summary(made, score, x, layout, summary, counts)
    return Edit(made.reduction(counts, raster=True), positions="auto", live=counts, visual=counts)


def with_summary(made: Zipped, score: Tensor, x: Tensor, layout: Layout, summary: Tensor, counts: Sequence[int]) -> Edit:
    """The edit of features ``x`` ``[I, N, C]`` that puts CLS ``[I, 1, C]`` in front of what stays.

    It takes the place of the token that it attends to most of those that do not stay; where all of them do, it stays out.
    """
    room = upload([k < n for k, n in zip(counts, layout.visual)], x.device)[:, None]
    gone = score.masked_fill(made.dominant | made.contextual | ~layout.valid, -1).argmax(1, keepdim=True)
    reduction = made.reduction(counts, summary=torch.where(room, gone, -1))
    merged = reduction.apply(x)
    values = torch.cat([torch.where(room[..., None], summary[:, :1], merged[:, :1]), merged[:, 1:]], dim=1)
    return Edit(reduction, positions="auto", values=values, live=tuple(counts), visual=tuple(counts))


@register
@dataclass(frozen=True)
class VisionZip(Tokens):
    """Keep the dominant tokens, merge the others into evenly spaced contextual ones."""

    name = "visionzip"
    title = "VisionZip"
    group = "before_llm"
    paper = "arXiv 2412.04467"
    helps = "Any question: no question is read, and what does not stay is merged by kind, so that no part is lost outright."
    needs = ("encoder attention and keys (1 block)", "features with CLS, or projected tokens")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 64
    """Tokens that are left of each grid (a picture, or one tile or view of it), CLS and contextual tokens included."""
    contextual: Annotated[int | float, CountOrShare("the tokens that are left")] = 10 / 64
    """Tokens among them that others are merged into, or their share; at least one, unless 0, and one less than ``keep`` at
    most."""
    place: Place | None = None
    """On what the projector is fed, CLS included (``"features"``), or on what the language model gets (``"embeddings"``);
    None = the first where the model allows it."""

    def check(self, traits: Traits) -> str | None:
        """Needs the encoder's attention; the published form needs CLS and rows before the projector."""
        return refuse_place(self.place, traits)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before or behind the projector."""
        return (Site("pre_projector" if on_features(self.place, traits) else "projected"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention and keys of the block that makes the features, and CLS beside them."""
        return reads_of(traits, on_features(self.place, traits))

    def workspace(self, shape: Shape) -> int:
        """Attention and keys of a block, similarities of tokens to targets, and what is merged."""
        return shape.edits + zip_bytes(shape, self.split(Budget(self.keep).of(shape.image_rows))[1])

    def split(self, keep: int) -> tuple[int, int]:
        """Dominant and contextual tokens of ``keep``."""
        wanted = self.contextual if isinstance(self.contextual, int) else max(round(self.contextual * keep), 1)
        contextual = min(wanted if self.contextual else 0, keep - 1)
        return keep - contextual, contextual

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Zip each grid on its own."""
        counts = tuple(min(Budget(self.keep).of(items[0].count), n) for items, n in zip(layout.items, layout.visual))
        if counts == layout.visual:
            return None
        splits = [self.split(k) if k < n else (n, 0) for k, n in zip(counts, layout.visual)]
        return edit_of(splits, x, layout, seen)


def zip_bytes(shape: Shape, contextual: int) -> int:
    """Bytes of attention and keys of an encoder block, of the likeness of tokens to targets, and of what is merged."""
    read = shape.image_attention(1 if shape.cls else CHUNK) + 2 * shape.floats(shape.features)
    likeness = 8 * shape.images * shape.image_rows * contextual
    return read + likeness + 3 * shape.floats(shape.features) + 24 * shape.images * shape.image_rows * INDEX
