"""Merge3D: what looks alike and lies close in space joins the token that the encoder attends to most.

Paper: "Merge3D: Efficient 3D Multimodal LLMs via Joint 2D-3D Token Merging", CVPR 2026, no arXiv id. Reconstructed from
public notes with its formulas; no code is public. Main tokens are those that received most attention in a block of the
encoder; every other joins the one with the largest product of similarities in meaning and in space, and each main token is
then itself plus the mean of what joined it. Semantic features are the tokens as the language model gets them. Geometric ones
are side data: ``geometry`` ``[H, W, d]`` of each picture (``[T, H, W, d]`` of a video), features of a 3D encoder such as
VGGT, or points in space (`back_projected` makes them of a depth map). A model that fuses both has done so before; nothing
is added to the tokens here. Reconstructed: both are compared at length 1, temperatures, the last block that feeds the
projector (in Qwen2.5-VL one with full attention), one pool for the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool3d, normalize

from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, Keep
from foveate.core.positions import Positions
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Item, last_of
from foveate.core.shape import Shape
from foveate.core.signal import ByItem, Columns, Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.attention import CHUNK
from foveate.ops.select import top_of_groups, top_rows

GEOMETRY = Side("geometry")
Geometry = Literal["features", "points", "none"]
BLOCK = 256
"""Tokens whose similarities to all main tokens are held at a time."""


def back_projected(depth: Tensor, focal: float) -> Tensor:
    """Points ``[..., H, W, 3]`` that a pinhole camera sees at ``depth`` ``[..., H, W]``, in the depth's unit.

    ``focal`` is the focal length in pixels of the depth map, whose middle the camera looks through.
    """
    rows, columns = depth.shape[-2:]
    y = torch.arange(rows, device=depth.device) - (rows - 1) / 2
    x = torch.arange(columns, device=depth.device) - (columns - 1) / 2
    return torch.stack([x * depth / focal, y[:, None] * depth / focal, depth], dim=-1)


def nearest_main(
    semantic: Tensor,
    geometric: Tensor | None,
    main: Tensor,
    group: Tensor,
    sem_temperature: float = 0.1,
    geo_temperature: float = 0.1,
    points: bool = False,
) -> Tensor:
    """Which main token each token joins: the one with the largest ``v.v' / sem_temperature + g.g' / geo_temperature``.

    Args:
        semantic: ``[B, N, D]``, compared as they are.
        geometric: ``[B, N, d]``, the same; None = meaning alone.
        main: ``[B, K]`` rows of the main tokens, ascending, -1 = padding.
        group: ``[B, N]`` tokens join main tokens of their own group only.
        sem_temperature, geo_temperature: of both similarities.
        points: whether the geometry is points: minus the squared distance then stands for ``g.g'``.

    Returns:
        ``[B, N]`` indices into ``main``; of equals the lowest.
    """
    rows = main.clamp(min=0)
    v = semantic.gather(1, rows[..., None].expand(-1, -1, semantic.shape[2])).mT / sem_temperature
    g = None if geometric is None else geometric.gather(1, rows[..., None].expand(-1, -1, geometric.shape[2]))
    there, own = (main >= 0)[:, None], group.gather(1, rows)[:, None]
    found = []
    for start in range(0, semantic.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        logits = semantic[:, part] @ v
        if geometric is not None and g is not None:
            near = -torch.cdist(geometric[:, part], g).square() if points else geometric[:, part] @ g.mT
            logits += near / geo_temperature
        found.append(logits.masked_fill_(~there | (group[:, part, None] != own), float("-inf")).argmax(2))
    return torch.cat(found, dim=1)


def joined(edit: Edit, target: Tensor, joins: Tensor) -> Edit:
    """The ``edit``, which keeps rows as they are, with the mean of what joins each of them added to it.

    Args:
        edit: keeps some of N rows.
        target: ``[B, N]`` the row, one that stays, that each row joins.
        joins: ``[B, N]`` bool: rows that go and join another.
    """
    reduction = edit.reduction
    batch, kept, rows = reduction.shape
    place = torch.arange(kept, device=target.device).expand(batch, -1)
    spare = reduction.anchor.masked_fill(reduction.anchor < 0, rows)
    slot = torch.full((batch, rows + 1), -1, device=target.device).scatter(1, spare, place)[:, :rows]
    goes = torch.where(joins, slot.gather(1, target), slot)
    count = torch.zeros(batch, kept, device=target.device).scatter_add(1, goes.clamp(min=0), joins.float())
    weight = torch.where(joins, 1 / count.gather(1, goes.clamp(min=0)).clamp(min=1), 1.0)
    return replace(edit, reduction=Reduction.merging(goes, weight, reduction.anchor))


@register
@dataclass(frozen=True)
class Merge3D(Tokens):
    """Merging by the product of similarities in meaning and in space."""

    name = "merge3d"
    title = "Merge3D"
    group = "before_llm"
    paper = "CVPR 2026"
    helps = "Views of a scene whose depth is known: what looks alike at different places stays apart."
    trained = "the model of its paper was fine-tuned with it for a quarter of an epoch"
    needs = ("encoder attention", "projected tokens", "side data: geometry (or geometry='none')")
    identity_at = {"keep": 1.0}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.3
    """Visual tokens that are left of a sample, or of each picture (see ``pool``)."""
    geometry: Geometry = "features"
    """What the side data is: features, compared by cosine; points, by their squared distance; or there is none."""
    sem_temperature: Annotated[float, AtLeast(1e-6)] = 0.1
    """Temperature of the cosine of two tokens."""
    geo_temperature: Annotated[float, AtLeast(1e-6)] = 0.1
    """Temperature of the cosine of their geometry, or of the squared distance, in the square of the points' unit."""
    pool: Literal["sample", "item"] = "sample"
    """Whether main tokens are chosen, and joined, among all pictures of a prompt or in each picture (video) alone."""
    layer: Annotated[int, AtLeast(0)] | None = None
    """Block of the encoder whose attention is read; None = the one that feeds the projector."""
    positions: Positions = "auto"
    """Rotary positions of what stays: ``"contiguous"`` (as if the prompt had been short), ``"anchor"`` (their own),
    ``"rank"`` (as if the grid had been smaller), or contiguous where positions are one row, else their own (``"auto"``)."""

    def check(self, traits: Traits) -> str | None:
        """Needs attention of the encoder; contiguous positions have no meaning under M-RoPE."""
        if traits.encoder_layers is None:
            return f"needs encoder signals, which are not available on {traits.family}; use divprune, uniform or random"
        return traits.refuse_positions(self.positions)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Attention received in the encoder, and the geometry."""
        layer = traits.feature_layer or 0 if self.layer is None else self.layer
        received = Columns(Site("encoder", layer))
        return (received,) if self.geometry == "none" else (received, GEOMETRY)

    def workspace(self, shape: Shape) -> int:
        """The tokens at length 1, similarities of a block of them, and attention of the encoder."""
        similarities = 16 * shape.samples * min(shape.visual, BLOCK) * shape.visual
        merged = 2 * shape.floats(shape.hidden)
        return shape.edits + 3 * shape.floats(shape.hidden) + merged + similarities + shape.image_attention(CHUNK)

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Choose main tokens, then let the others join them."""
        alive, budget = layout.alive, Budget(self.keep)
        per_item = [[min(budget.of(item.count), n) for item, n in zip(*of)] for of in zip(layout.items, alive)]
        counts = tuple(min(budget.of(all_), n) for all_, n in zip(layout.originals, layout.visual))
        counts = tuple(map(sum, per_item)) if self.pool == "item" else counts
        if counts == layout.visual:
            return None
        received = next(value for signal, value in seen.items() if isinstance(signal, Columns))
        importance = _by_row(received, layout)
        visual = layout.rows(*VISUAL)
        if self.pool == "item":
            chosen = top_of_groups(importance, layout.item.masked_fill(~visual, -1), per_item)
            edit = layout.keeping(chosen, counts, self.positions, by_item=tuple(map(tuple, per_item)))
        else:
            edit = layout.keeping(top_rows(importance, visual, counts), counts, self.positions)
        anchor = edit.reduction.anchor
        kept = torch.zeros(x.shape[0], x.shape[1] + 1, dtype=torch.bool, device=x.device)
        kept = kept.scatter(1, anchor.masked_fill(anchor < 0, x.shape[1]), True)[:, :-1]
        main = last_of(kept & visual, max(edit.visual or counts))
        found = nearest_main(
            normalize(x.float(), dim=-1),
            self._geometry(seen, layout),
            main,
            layout.item if self.pool == "item" else torch.zeros_like(layout.item),
            self.sem_temperature,
            self.geo_temperature,
            self.geometry == "points",
        )
        return joined(edit, main.gather(1, found).clamp(min=0), visual & ~kept)

    def _geometry(self, seen: Seen, layout: Layout) -> Tensor | None:
        """``[B, N, d]`` geometry of each row, 0 where it is not visual."""
        if GEOMETRY not in seen:
            return None
        images = [(b, j) for b, items in enumerate(layout.items) for j in range(len(items))]
        given = [self._on_grid(one, layout.items[b][j]) for (b, j), one in zip(images, seen[GEOMETRY].of(images))]
        widths = {one.shape[1] for one in given}
        if len(widths) > 1:
            raise FoveateError(f"merge3d: geometry: pictures have {sorted(widths)} values a place; give all the same number")
        # One table of all grids, behind a row for what is no token.
        table = torch.cat([given[0].new_zeros(1, given[0].shape[1]), *given])
        starts, most = [], max(map(len, layout.items))
        start = 1
        for items in layout.items:
            own = [start + sum(item.count for item in items[:j]) for j in range(len(items))]
            starts.append(own + [0] * (most - len(items)))
            start += sum(item.count for item in items)
        first = upload(starts, layout.item.device).gather(1, layout.item.clamp(min=0))
        return table[torch.where(layout.ordinal >= 0, first + layout.ordinal, 0)]

    def _on_grid(self, given: Tensor, item: Item) -> Tensor:
        """``[rows * columns, d]`` geometry of a picture's tokens: means over the places that each one shows."""
        if not isinstance(given, Tensor) or given.ndim not in (3, 4):
            shape = tuple(given.shape) if isinstance(given, Tensor) else type(given).__name__
            raise FoveateError(f"merge3d: geometry={shape}: must be [H, W, d] of each picture, or [T, H, W, d] of a video")
        frames = given.float() if given.ndim == 4 else given.float()[None]
        grid = (item.frames, item.rows // item.frames, item.columns)
        pooled = adaptive_avg_pool3d(frames.permute(3, 0, 1, 2)[None], grid)[0].flatten(1).T
        return pooled if self.geometry == "points" else normalize(pooled, dim=-1)


def _by_row(signal: ByItem, layout: Layout) -> Tensor:
    """A signal of each token as one of each row ``[B, N]``, 0 where it is not visual."""
    out = torch.zeros(layout.shape, device=layout.item.device)
    groups: dict[int, list[tuple[int, int]]] = {}
    for b, items in enumerate(layout.alive):
        for j, count in enumerate(items):
            groups.setdefault(count, []).append((b, j))
    for count, entries in groups.items():
        if count:
            out[upload([b for b, _ in entries], out.device)[:, None], layout.where(entries)] = signal.of(entries)
    return out
