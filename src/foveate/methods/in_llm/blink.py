"""Blink: while a part of the picture holds the question's attention, layers see a finer copy of it behind the picture.

Paper: "Blink: Dynamic Visual Token Resolution for Enhanced Multimodal Understanding", arXiv 2512.10548: a method for better
answers, not for speed. No code is public; reconstructed from public notes, which name no thresholds. This is the variant
that interpolates (Blink-interp), without trained modules. Before each layer of a band the last prompt token's attention to
the visual tokens is summed by regions. If one region holds more than a share, its rows, interpolated bilinearly to a finer
grid, are put in behind the picture; once no region holds enough, they leave again, and behind the band in any case.

Reconstructed, our choice: thresholds are multiples of the share that every region would have; a region's finer rows have the
positions of the tokens that they come from; softmax over the whole row, mean over heads; regions of all pictures (frames)
compete; layers that ran meanwhile hold the finer rows, and decoding reads them there; a prompt that ends in its picture gets
them in front of its last row. Tokens that other methods dropped are left out of sums and interpolation.

What is done depends on the data: each layer of the band waits for the device once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Self

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Layers
from foveate.core.ranking import ranked
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Role
from foveate.core.shape import INDEX, Shape
from foveate.core.signal import Function, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.core.tunable import Range, Tunable
from foveate.ops.attention import from_rows


def regions(layout: Layout, side: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Regions of ``side * side`` tokens, smaller at the ends of grids that this does not divide; frames have their own.

    Returns:
        ``[B, N]`` region of each visual row, -1 elsewhere; ``[B, N]`` its cell in the region; regions of each sample.
    """
    most = max(map(len, layout.items), default=0)
    tables, totals = [], []
    for items in layout.items:
        rows, total = [], 0
        for item in items:
            frame_rows = item.rows // item.frames
            sides = (-(-item.columns // side), -(-frame_rows // side))
            rows.append([frame_rows, *sides, total])
            total += item.frames * math.prod(sides)
        tables.append(rows + [[1, 1, 1, 0]] * (most + 1 - len(items)))
        totals.append(total)
    table = upload(tables, layout.item.device)
    of = table.gather(1, layout.item.clamp(min=0)[..., None].expand(-1, -1, 4))
    height, across, below, first = of.unbind(2)
    y, x = layout.yx.unbind(2)
    frame, y = y.div(height, rounding_mode="floor"), y % height
    region = first + (frame * below + y.div(side, rounding_mode="floor")) * across + x.div(side, rounding_mode="floor")
    cell = (y % side) * side + x % side
    hidden = ~layout.rows(*VISUAL)
    return region.masked_fill(hidden, -1), cell.masked_fill(hidden, -1), tuple(totals)


def most_salient(saliency: Tensor, region: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The region ``[B]`` with the largest sum of ``saliency`` ``[B, N]``, the first of equals, and its share ``[B]``.

    ``region`` ``[B, N]`` is below ``count``, -1 = none. Where there is no saliency the share is 0.
    """
    sums = saliency.new_zeros(len(saliency), count + 1)
    sums = sums.scatter_add(1, region.masked_fill(region < 0, count), saliency)[:, :count]
    largest, best = sums.max(1)
    return best, largest / sums.sum(1).clamp(min=torch.finfo(sums.dtype).tiny)


def finer(side: int, scale: int) -> tuple[Tensor, Tensor]:
    """Bilinear interpolation of a region to ``scale`` times as many rows and columns.

    Returns:
        ``[F]`` cell that each of the F = ``(side * scale) ** 2`` finer ones lies in, in raster order, and ``[F, side ** 2]``
        weights, which add up to 1 once they are divided by their sum over the cells that are there.
    """
    along = torch.arange(side * scale)
    centre = (along + 0.5) / scale - 0.5
    tent = (1 - (centre[:, None] - torch.arange(side)).abs()).clamp(min=0)  # [side * scale, side]
    own = along // scale
    cell = own[:, None] * side + own
    weight = tent[:, None, :, None] * tent[None, :, None, :]
    return cell.flatten(), weight.reshape(len(along) ** 2, side**2)


def with_finer(layout: Layout, keep: Tensor, table: Tensor, width: int, side: int, scale: int) -> tuple[Reduction, Tensor]:
    """Put the finer rows of a region in behind its picture.

    Args:
        layout: of the N rows.
        keep: ``[B, N]`` bool: rows that stay.
        table: ``[B, side ** 2]`` row of each cell of the region, -1 = not there (all: nothing is put in).
        width: most rows of a sample that come out.
        side, scale: as `finer` takes them.

    Returns:
        The reduction, padded on the left, and ``[B, width]`` bool: which rows were put in.
    """
    batch, rows = keep.shape
    own, weight = (part.to(keep.device) for part in finer(side, scale))
    there, count = table >= 0, len(own)
    source = table[:, own]
    place = torch.arange(rows, device=keep.device)
    picture = layout.item.gather(1, table.amax(1, keepdim=True).clamp(min=0))
    end = torch.where((layout.item == picture) & layout.rows(*VISUAL), place + 1, 0).amax(1, keepdim=True)
    # In front of the row behind the picture, or of the prompt's last one, which stays the last.
    before = end.minimum(layout.last) * (count + 1)
    old = torch.where(keep, place * (count + 1) + count, -1)
    new = torch.where(source >= 0, before + torch.arange(count, device=keep.device), -1)
    keys, order = torch.cat([old, new], dim=1).sort(dim=1, stable=True)
    keys, order = keys[:, -width:], order[:, -width:]
    real = keys >= 0
    anchor = torch.cat([place.expand(batch, -1), source], dim=1).gather(1, order).masked_fill(~real, -1)

    # Rows that stay, with weight 1, and those that are put in, of all cells of the region that are there.
    slot = torch.full((batch, rows + count), -1, device=keep.device)
    slot = slot.scatter(1, order, torch.where(real, torch.arange(order.shape[1], device=keep.device), -1))
    sample = torch.arange(batch, device=keep.device)[:, None]
    target = torch.where(slot >= 0, slot + sample * order.shape[1], anchor.numel())
    shares = weight * there[:, None]
    shares = shares / shares.sum(2, keepdim=True).clamp(min=torch.finfo(shares.dtype).tiny)
    feeds = (table.clamp(min=0) + sample * rows)[:, None].expand(-1, count, -1)
    into = target[:, rows:, None].expand(-1, -1, table.shape[1])
    entries = (
        torch.cat([target[:, :rows].flatten(), into.flatten()]),
        torch.cat([(place + sample * rows).flatten(), feeds.flatten()]),
        torch.cat([torch.ones_like(old, dtype=shares.dtype).flatten(), shares.flatten()]),
    )
    return Reduction(rows, anchor, entries), (order >= rows) & real


@register
@dataclass(frozen=True)
class Blink(Tokens):
    """Interpolated rows of the region that is attended to, in a band of layers."""

    name = "blink"
    title = "Blink"
    group = "in_llm"
    paper = "arXiv 2512.10548"
    helps = "Questions about one small part of a picture, where the answer counts and not its cost: it adds rows."
    needs = ("decoder queries and keys (each layer of the band)",)
    identity_at = {"expand": 1e6}  # noqa: RUF012
    inserts = True

    band: Annotated[tuple[int, ...], Layers(stages=2)] | None = None
    """First and last layer before which regions are looked at, counted from 0; None = 12 and 18 of 32."""
    region: Annotated[int, AtLeast(1)] = 4
    """Rows and columns of a region in tokens; our choice."""
    scale: Annotated[int, AtLeast(1)] = 2
    """Finer rows and columns for each one of a region; 1 = copies."""
    expand: Annotated[float, AtLeast(0)] = 3.0
    """Finer rows come where a region holds more than so many times the share that every region would have; our choice."""
    drop: Annotated[float, AtLeast(0)] = 2.0
    """They leave where no region holds so many times that share; 0 = only behind the band; our choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require(self.drop <= self.expand, "drop", f"must be at most expand={self.expand!r}, or rows would come and go")

    def fitted(self, traits: Traits) -> Self:
        """The band at the paper's share of the depth."""
        return replace(self, band=self.band or traits.same_depth((12, 18), of=32))

    def check(self, traits: Traits) -> str | None:
        """The layers of the band have attention, and no window that finer rows would push others out of."""
        first, last = self.fitted(traits).band or (0, 0)
        sliding = [layer for layer in traits.sliding if first <= layer <= last]
        if sliding:
            return f"band={(first, last)}: layers {sliding} have sliding attention, whose windows count rows; choose others"
        return traits.refuse_layers("band", (first, last), attention=range(first, last + 1))

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """The inputs of the band's layers, and of the one behind it."""
        first, last = self.fitted(traits).band or (0, 0)
        return tuple(Site("decoder", layer) for layer in range(first, min(last + 2, traits.decoder_layers)))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Queries and keys of the band's layers."""
        first, last = self.fitted(traits).band or (0, 0)
        return tuple(Function("query_key", layer) for layer in range(first, last + 1))

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How much attention brings finer rows."""
        return {"expand": Range(self.drop, 16.0)}

    def workspace(self, shape: Shape) -> int:
        """Queries and keys of a layer; the finer rows, and what each is made of."""
        more = shape.samples * (self.region * self.scale) ** 2
        weights = 8 * INDEX * more * self.region**2
        grown = more * (6 * shape.width * shape.itemsize + 48 * INDEX)
        return shape.edits + shape.hidden + 4 * (shape.queries + shape.keys) + shape.attention(1) + weights + 2 * grown

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Look where the attention is; put finer rows in, or take them out."""
        there: tuple[int, ...] = state.get("prefill", self.name) or (0,) * len(layout.live)
        table, added, gone = None, (0,) * len(there), tuple(rows > 0 for rows in there)
        if site.layer <= (self.band or (0, 0))[1]:
            query, key = seen[Function("query_key", site.layer)](x, layout)
            region, cell, totals = regions(layout, self.region)
            saliency = from_rows(query, key, layout.last, layout.prompt[:, None]).masked_fill(region < 0, 0)
            best, share = most_salient(ranked(saliency), region, max(totals))
            mine = (region == best[:, None]) & (region >= 0)
            uniform = upload([1 / max(total, 1) for total in totals], x.device)
            # The one wait: where finer rows come, how many, and where they leave.
            asked = torch.stack([share > self.expand * uniform, share < self.drop * uniform, mine.sum(1)]).tolist()
            enough, few, tokens = asked
            added = tuple(
                count * self.scale**2 if grow and not rows else 0 for grow, count, rows in zip(enough, tokens, there)
            )
            gone = tuple(bool(leave and rows) for leave, rows in zip(few, there))
            place, cells = torch.arange(mine.shape[1], device=x.device).expand_as(cell), self.region**2
            table = torch.full((len(mine), cells + 1), -1, device=x.device)
            table = table.scatter(1, cell.masked_fill(~mine, cells), place)[:, :cells]
        if not any(added) and not any(gone):
            return None
        state.put("prefill", self.name, tuple(n + (0 if leave else rows) for n, leave, rows in zip(added, gone, there)))
        live = tuple(n + new - rows * leave for n, new, rows, leave in zip(layout.live, added, there, gone))
        leaving = upload(gone, x.device)[:, None] & (layout.role == Role.INSERTED)
        if table is None or not any(added):
            left = Reduction.keeping(layout.valid & ~leaving, live)
            return Edit(left, live=live, visual=layout.visual, by_item=layout.by_item)
        table = table.masked_fill(~upload([n > 0 for n in added], x.device)[:, None], -1)
        reduction, inserted = with_finer(layout, layout.valid & ~leaving, table, max(live), self.region, self.scale)
        return Edit(reduction, live=live, visual=layout.visual, by_item=layout.by_item, inserted=inserted)
