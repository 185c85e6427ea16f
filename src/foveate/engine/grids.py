"""Grids of pictures as rows: layouts of encoders, full grids with holes, and the way between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.layout import Edit, Layout
from foveate.core.reduction import Reduction
from foveate.core.roles import Item, Role
from foveate.core.signal import Attention
from foveate.models.anatomy import Encoder, View


@dataclass
class Survivors:
    """The tokens of one view that are alive when the encoder is done.

    Attributes:
        rank: ``[count]`` place of each token among those alive, -1 = gone; None where all live, in raster order.
        count: how many live.
    """

    rank: Tensor | None
    count: int

    def ordinal(self, device: torch.device) -> Tensor:
        """``[count]`` raster indices of those alive, in their order."""
        if self.rank is None:
            return torch.arange(self.count, device=device)
        spare = torch.where(self.rank >= 0, self.rank, len(self.rank))
        return spare.argsort(stable=True)[: self.count].to(device)


def picture_layout(
    grids: Sequence[tuple[int, int, int]], there: Tensor, prefix: int, ordinal: Tensor | None = None
) -> Layout:
    """Images, given as rows, columns and frames: ``prefix`` summary rows, then patches in raster order (or ``ordinal``)."""
    batch, rows = there.shape
    number = torch.arange(rows, device=there.device).expand(batch, -1)
    summary = number < prefix
    role = torch.where(summary, int(Role.CLS), int(Role.IMAGE)).masked_fill(~there, int(Role.PAD))
    cell = number - prefix if ordinal is None else ordinal
    hidden = summary | ~there
    counts = [min(r * c, rows - prefix) for r, c, _ in grids] if ordinal is None else [rows] * batch
    return Layout(
        origin=number,
        role=role,
        item=torch.zeros_like(number).masked_fill(hidden, -1),
        ordinal=cell.masked_fill(hidden, -1),
        positions=number[None],
        size=there.float(),
        items=tuple((Item(r, c, source, frames),) for source, (r, c, frames) in enumerate(grids)),
        live=tuple(count + prefix for count in counts),
        visual=tuple(counts),
    )


def without_prefix(layout: Layout, prefix: int) -> Layout:
    """The same rows without the summary rows, which stand behind the padding of ragged images."""
    live = tuple(count - prefix for count in layout.live)
    return layout.after(Edit(patch_rows(layout, prefix), live=live, visual=layout.visual))


def summary_rows(layout: Layout, prefix: int) -> Reduction:
    """Picks the ``prefix`` summary rows of each image, which may stand behind the padding of ragged ones."""
    return Reduction.keeping(layout.role == Role.CLS, (prefix,) * layout.shape[0])


def patch_rows(layout: Layout, prefix: int) -> Reduction:
    """Picks all other rows, padding too."""
    return Reduction.keeping(layout.role != Role.CLS, (layout.shape[1] - prefix,) * layout.shape[0])


def behind_prefix(edit: Edit, prefix: int, device: torch.device) -> Edit:
    """An edit of patches, with its counts, as one of patches behind summary rows, which stay."""
    reduction = edit.reduction.to(device)
    if not prefix:
        return replace(edit, reduction=reduction)
    anchor = reduction.anchor
    behind = torch.where(anchor >= 0, anchor + prefix, -1)
    summary = torch.arange(prefix, device=anchor.device).expand(anchor.shape[0], -1)
    # Padding stands in front: summary rows go between it and the patches, by a stable sort of what is padding.
    whole = torch.cat([summary, behind], dim=1)
    order = (whole >= 0).to(torch.uint8).argsort(dim=1, stable=True)
    live = None if edit.live is None else tuple(count + prefix for count in edit.live)
    return Edit(Reduction.gather(whole.gather(1, order), reduction.inputs + prefix), live=live, visual=edit.visual)


def dense(x: Tensor, layout: Layout, rows: int) -> Tensor:
    """Rows ``[I, k, D]`` at their own cells of the full grid ``[I, rows, D]``, zero elsewhere."""
    out = x.new_zeros(x.shape[0], rows + 1, x.shape[2])
    index = torch.where(layout.valid & (layout.ordinal >= 0), layout.ordinal, rows)
    return out.scatter(1, index[..., None].expand_as(x), x)[:, :rows]


def ranks(layout: Layout, rows: int) -> Tensor:
    """``[I, rows]`` place of each cell of the full grid among those alive, -1 = gone."""
    return dense(layout.valid.long().cumsum(1)[..., None], layout, rows)[..., 0] - 1


def survivors(rank: Tensor, fed: Sequence[Tensor], rows: int, counts: Sequence[int]) -> list[Survivors]:
    """What is left of views, given the `ranks` of their tokens within the tiles that these are rows of.

    Args:
        rank: of the tokens of all views, one view after the other.
        fed: for each view, the rows of its tokens, counted over tiles of ``rows`` (on the host).
        rows: of a tile.
        counts: how many live in each tile.
    """
    tiles = [of.div(rows, rounding_mode="floor").tolist() for of in fed]
    own = list(rank.split([len(of) for of in tiles]))
    # Several tiles make one grid: raster order, whatever the order inside of each tile.
    joined = [number for number, of in enumerate(tiles) if len(of) != rows or len(set(of)) > 1]
    alive = [own[number] >= 0 for number in joined]
    known = [counts[of[0]] for of in tiles]
    for number, mine, count in zip(joined, alive, torch.stack([of.sum() for of in alive]).tolist() if alive else ()):
        own[number], known[number] = in_raster_order(mine), count
    return [Survivors(*left) for left in zip(own, known)]


def encoded(encoder: Encoder | None, views: Sequence[View]) -> tuple[int, int]:
    """How many tiles of ``views`` the encoder was shown, and its rows for the largest one."""
    cells = [view.cells for view in views if view.cells is not None]
    if encoder is None or not cells:
        return 0, 0
    if encoder.tile is None:
        return len(cells), max(c.numel() for c in cells)
    return max(int(c.max()) for c in cells) // encoder.tile + 1, encoder.tile + encoder.prefix


def alike(views: Sequence[View], left: Sequence[Survivors]) -> list[list[int]]:
    """Numbers of the views of one grid and one number of survivors, for each such group, in order."""
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for number, (view, alive) in enumerate(zip(views, left)):
        groups.setdefault((view.rows, view.columns, view.frames, alive.count), []).append(number)
    return list(groups.values())


def in_raster_order(alive: Tensor) -> Tensor:
    """``[n]`` place of each token among those ``alive`` ``[n]`` (bool), -1 = gone."""
    return torch.where(alive, alive.long().cumsum(0) - 1, -1)


def dense_signal(value: Any, layout: Layout, rows: int) -> Any:
    """A signal of the rows of ``layout``, of the full grid instead; zero where nothing lives."""
    if isinstance(value, Attention):
        batch, heads, queries, keys = value.logits.shape
        flat = value.logits.permute(0, 3, 1, 2).reshape(batch, keys, heads * queries)
        full = dense(flat, layout, rows).reshape(batch, rows, heads, queries).permute(0, 2, 3, 1)
        return Attention(full, value.lse)
    if isinstance(value, Tensor):
        wide = value if value.ndim == 3 else value[..., None]
        full = dense(wide, layout, rows)
        return full if value.ndim == 3 else full[..., 0]
    return value


def length(value: Any) -> int | None:
    """Rows that a signal has."""
    if isinstance(value, Attention):
        return value.logits.shape[-1]
    return value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else None


def without_columns(value: Any, prefix: int) -> Any:
    """A signal without its first ``prefix`` rows (keys, of attention)."""
    if isinstance(value, Attention):
        return Attention(value.logits[..., prefix:], value.lse)
    return value[:, prefix:] if isinstance(value, Tensor) else value


def by_token(value: Any, cells: Tensor) -> Any:
    """A signal of an encoder's rows, of tokens instead: the mean over the ``cells`` ``[n, g]`` (on the host) of each.

    Rows in front of the cells (CLS, of queries, keys and values) stay as they are. Of attention rows, the probabilities are
    averaged. What is of tokens already comes back as it is.
    """
    count, group = cells.shape
    if isinstance(value, tuple):
        return tuple(by_token(part, cells) for part in value)
    if isinstance(value, Attention):
        ahead, logits = value.logits.shape[-1] - count * group, value.logits
        if ahead < 0:
            return value
        joined = logits[..., upload(cells + ahead, logits.device)].logsumexp(-1) - math.log(group)
        return Attention(torch.cat([logits[..., :ahead], joined], dim=-1), value.lse)
    rows = value.transpose(1, 2) if value.ndim == 4 else value
    ahead = rows.shape[1] - count * group
    if ahead < 0:
        return value
    joined = torch.cat([rows[:, :ahead], rows[:, upload(cells + ahead, rows.device)].mean(2)], dim=1)
    return joined.transpose(1, 2) if value.ndim == 4 else joined


def spread(x: Tensor, kept: Tensor, total: int) -> Tensor:
    """Rows ``x`` ``[n, ...]`` at the places ``kept`` of ``total``, zero elsewhere."""
    return x.new_zeros(total, *x.shape[1:]).index_copy(0, kept.to(x.device), x)
