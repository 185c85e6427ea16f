"""PruMerge: tokens whose CLS attention is an outlier stay, and take up what their nearest neighbours hold.

Paper: "LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models", arXiv 2403.15388. ``plus`` adds a
sparse grid of tokens (PruMerge+). By default as the published code merges: an un-normalised sum over neighbours among *all*
other tokens, and one more token for all that was dropped; ``reading="paper"`` takes weighted means over dropped neighbours
and has no such token. Differs from the code: outliers are counted for each image (not for the batch), at least one;
duplicates between grid and outliers never arise. Reconstructed: a budget ``keep`` (the additional token included), of which
PruMerge+ spends half on an even grid of what is left; mean received attention where the encoder has no CLS; the token's
place in the mean of the paper's reading; the mean of queries and of keys where a token is several cells (pixel shuffle).

The adaptive count has to come to the host once for each forward, because the prompt's length depends on it.
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
from foveate.core.parameters import AtLeast, Keep
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.shape import INDEX, Shape
from foveate.core.signal import QueryKey, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import columns, row_logits
from foveate.ops.select import top_k

Reading = Literal["code", "paper"]
CHUNK = 256
"""Kept tokens whose similarities to all others are held at a time."""


def full_width(heads: Tensor) -> Tensor:
    """Queries or keys ``[I, H, n, d]`` as one head ``[I, n, H * d]``."""
    return heads.transpose(1, 2).flatten(2)


def cls_attention(query: Tensor, key: Tensor, prefix: int, valid: Tensor | None = None) -> Tensor:
    """Attention of CLS under one head of the full width, or the mean received where there is no CLS.

    Args:
        query, key: ``[I, n, C]`` of all rows.
        prefix: CLS rows, which come first.
        valid: ``[I, n - prefix]`` tokens that are not padding; None = all.

    Returns:
        ``[I, n - prefix]`` float32, 0 for padding.
    """
    scale = query.shape[2] ** -0.5
    if prefix:
        logits = row_logits(query[:, None, :1], key[:, None], scale)[:, 0, 0]
        if valid is not None:
            logits[:, prefix:].masked_fill_(~valid, float("-inf"))
        return logits.softmax(-1)[:, prefix:]
    allowed = None if valid is None else valid[:, :, None] & valid[:, None]
    return columns(query[:, None], key[:, None], scale, allowed)


def outliers(attention: Tensor, valid: Tensor, fence: float = 1.5) -> Tensor:
    """``[I]`` how many of ``attention`` ``[I, N]`` lie more than ``fence`` interquartile ranges above the third quartile."""
    quarters = upload([0.25, 0.75], attention.device)
    first, third = attention.masked_fill(~valid, float("nan")).nanquantile(quarters, dim=1, keepdim=True)
    count: Tensor = ((attention > third + fence * (third - first)) & valid).sum(1)
    return count


def even_grid(rest: Tensor, count: Tensor) -> Tensor:
    """Mask ``[I, N]`` of ``count`` ``[I]`` evenly spaced ones of the cells ``rest`` ``[I, N]`` (bool)."""
    total, count = rest.sum(1, keepdim=True), count[:, None]
    before = (rest.long().cumsum(1) - 1) * count + total // 2
    return rest & ((before + count) // total.clamp(min=1) > before // total.clamp(min=1))


def published_grid(valid: Tensor, count: Tensor) -> Tensor:
    """Mask ``[I, N]`` of PruMerge+'s grid for ``count`` ``[I]`` outliers: every (N // count // 3)-th token but the last."""
    total, place = valid.sum(1, keepdim=True), valid.long().cumsum(1) - 1
    stride = (total // count[:, None] // 3).clamp(min=1)
    return valid & (place % stride == 0) & (place < total - 1)


def merging(
    attention: Tensor,
    keys: Tensor,
    order: Tensor,
    kept: Tensor,
    valid: Tensor,
    counts: Sequence[int],
    *,
    neighbours: int = 32,
    reading: Reading = "code",
) -> Reduction:
    """Merge each kept token with its neighbours, and what was dropped into one more token at the end.

    Args:
        attention: ``[I, N]`` weights.
        keys: ``[I, N, C]`` what neighbourhood (cosine) is measured on.
        order: ``[I, N]`` numbers below 2 N that put kept tokens in their order.
        kept: ``[I, N]`` tokens that stay, at least one of each image. An image that keeps all is left alone.
        valid: ``[I, N]`` tokens that are not padding.
        counts: tokens that come out of each image: those kept, or one more.
        neighbours: tokens merged into each kept one.
        reading: ``"code"`` or ``"paper"``, see the module.
    """
    (images, tokens), width, device = attention.shape, max(counts), attention.device
    place, slot = torch.arange(tokens, device=device), torch.arange(width, device=device)
    made = upload(tuple(counts), device)[:, None]
    dropped = valid & ~kept
    whole, another = ~dropped.any(1, keepdim=True), made > kept.sum(1, keepdim=True)
    leader = attention.masked_fill(~dropped, -1).max(1, keepdim=True).indices
    ranked = torch.where(whole, place, order.scatter(1, leader, 2 * tokens))
    anchor = ranked.masked_fill(~kept & (whole | (place != leader)), 3 * tokens).sort(dim=1, stable=True).indices[:, :width]
    stays = kept.gather(1, anchor) & (slot < made)  # neither the additional token nor padding
    merges = stays & ~whole

    unit = torch.nn.functional.normalize(keys.float(), dim=-1)
    candidates = dropped if reading == "paper" else valid
    most, starts = min(neighbours, tokens - 1), range(0, width, CHUNK)
    chunks = [_nearest(unit, anchor[:, start : start + CHUNK], candidates, most) for start in starts]
    near, there = (torch.cat(parts, dim=1) for parts in zip(*chunks))
    weight = attention[:, None].expand(-1, width, -1).gather(2, near) * (there & merges[..., None])
    own_weight = stays.to(weight.dtype)
    if reading == "paper":
        own_weight = torch.where(merges, attention.gather(1, anchor), own_weight)
        total = (own_weight + weight.sum(2)).clamp(min=torch.finfo(weight.dtype).tiny)
        own_weight, weight = own_weight / total, weight / total[..., None]

    sample = torch.arange(images, device=device)[:, None]
    row, first = sample * width + slot, sample * tokens
    target = (row[..., None].expand_as(near), row, (sample * width + made - 1).expand_as(attention))
    source = (near + first[..., None], anchor + first, place + first)
    weights = (weight, own_weight, attention * (dropped & another))
    to, of, by = (torch.cat([part.flatten() for part in parts]) for parts in (target, source, weights))
    return Reduction(tokens, anchor.masked_fill(slot >= made, -1), (to, of, by))


def _nearest(unit: Tensor, own: Tensor, candidates: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` candidates ``[I, N]`` nearest to the tokens ``own`` ``[I, k]`` (not themselves), and which there are."""
    mine = unit.gather(1, own[..., None].expand(-1, -1, unit.shape[2]))
    similarity = (mine @ unit.transpose(1, 2)).masked_fill(~candidates[:, None], float("-inf"))
    similarity = similarity.scatter(2, own[..., None], float("-inf"))
    near = top_k(similarity, count)
    return near, similarity.gather(2, near) > float("-inf")


@register
@dataclass(frozen=True)
class PruMerge(Tokens):
    """Keep the outliers of CLS attention (``plus``: and a grid), merged with their neighbours."""

    name = "prumerge"
    title = "PruMerge"
    group = "before_llm"
    paper = "arXiv 2403.15388"
    helps = "Pictures that differ in how much they hold: without ``keep`` each has as many tokens as stand out in it."
    trained = "the main results of its paper are of a model that was fine-tuned with it (LoRA)"
    needs = ("encoder queries and keys (1 block)", "rows before the projector")

    keep: Annotated[int | float, Keep()] | None = None
    """Tokens that are left of each grid (a picture, or one tile or view of it); None = as many as there are outliers."""
    plus: bool = False
    """Whether an even grid of tokens stays, too (PruMerge+)."""
    fence: Annotated[float, AtLeast(0)] = 1.5
    """How many interquartile ranges above the third quartile a token's attention is an outlier; without ``keep``."""
    neighbours: Annotated[int, AtLeast(0)] = 32
    """Tokens that are merged into each one that stays."""
    layer: Annotated[int, AtLeast(0)] | None = None
    """Block whose queries and keys are read; None = the one behind the features, which is fed the same tokens."""
    reading: Reading = "code"
    """Whether to merge as the published code does or as the paper says: see above."""

    def budget(self) -> Budget | None:
        """Tokens to keep of each image, if that is not left to the image."""
        return None if self.keep is None else Budget(self.keep)

    def check(self, traits: Traits) -> str | None:
        """Needs queries and keys of a block that exists, and rows before the projector."""
        if traits.encoder_layers is None or traits.feature_layer is None:
            return f"needs encoder attention, which is not available on {traits.family}; use fastv, uniform or random"
        refused = traits.refuse_sites("pre_projector")
        if refused:
            return f"{refused}; use hiprune or scope"
        last = traits.encoder_layers - 1
        if self.layer is None and traits.feature_layer == last:
            return f"no encoder block follows the one that makes the features; read that one, layer={last}"
        if self.layer is not None and self.layer > last:
            return f"layer={self.layer}: must be in 0..{last}"
        return None

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the projector."""
        return (Site("pre_projector"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Queries and keys of the block."""
        layer = (traits.feature_layer or 0) + 1 if self.layer is None else self.layer
        return (QueryKey(Site("encoder", layer)),)

    def workspace(self, shape: Shape) -> int:
        """Queries and keys of a block, similarities of a chunk of tokens, numbers of the tokens that each one joins."""
        tokens, budget = shape.image_rows, self.budget()
        most = tokens if self.plus else tokens // 4  # no more than a quarter lies above the third quartile
        kept = min(most if budget is None else budget.of(tokens), tokens) + 1
        near = 32 * min(kept, CHUNK) * tokens
        merged = 12 * INDEX * (kept * (self.neighbours + 1) + tokens)
        return shape.edits + 4 * shape.features + 4 * shape.floats(shape.features) + shape.images * (near + merged)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Choose in each image, merge with what is near."""
        ((query, key),) = seen.values()
        query, key, valid = full_width(query), full_width(key), layout.valid
        prefix = key.shape[1] - x.shape[1]
        attention = cls_attention(query, key, prefix, None if layout.dense else valid)
        ranking = top_k(attention.masked_fill(~valid, float("-inf")), x.shape[1])
        place = torch.arange(x.shape[1], device=x.device).expand_as(ranking)
        rank = torch.zeros_like(ranking).scatter(1, ranking, place)
        extra = self.reading == "code"

        budget = self.budget()
        if budget is None:
            tops = outliers(attention, valid, self.fence).clamp(min=1)
            top = (rank < tops[:, None]) & valid
            kept = top | published_grid(valid, tops) if self.plus else top
            # How many there are is known on the device alone: the one wait of this method.
            counts = tuple((kept.sum(1) + (extra & (kept != valid).any(1))).tolist())
        else:
            counts = tuple(min(budget.of(items[0].count), n) for items, n in zip(layout.items, layout.visual))
            if counts == layout.visual:
                return None
            room = [k - (extra and 1 < k < n) for k, n in zip(counts, layout.visual)]
            spread = [k // 2 if self.plus and k < n else 0 for k, n in zip(room, layout.visual)]
            tops, grid = (upload(c, x.device) for c in ([k - s for k, s in zip(room, spread)], spread))
            top = (rank < tops[:, None]) & valid
            kept = top | even_grid(valid & ~top, grid)
        reduction = merging(
            attention,
            key[:, prefix:],
            torch.where(top, rank, x.shape[1] + place),
            kept,
            valid,
            counts,
            neighbours=self.neighbours,
            reading=self.reading,
        )
        return Edit(reduction, positions="auto", live=counts, visual=counts)
