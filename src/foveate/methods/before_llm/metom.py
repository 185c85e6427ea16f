"""MeToM: the video's codec says where merging costs least, before the encoder, before and inside the language model.

Patches that hardly changed are merged in front of the encoder (RPM); frames get budgets from the sizes of their packets,
and tokens are merged across and within frames (BTM); what several layers ignore is merged at last (MATM). Paper: "MeToM:
Metadata-Guided Token Merging for Efficient Video LLMs", CVPR 2026, no arXiv id. Reconstructed from public notes; no code
is public. Reconstructed: all thresholds; a patch's density is the mean over its pixels; components have four neighbours;
pairs of adjacent frames, best first, each token once, at the earlier one's place, which then serves both frames; a core
token and those folded into it count alike; survivors keep their positions; the last token asks, once, behind the last of
``layers``; caches of the layers before stay whole. Pictures of one size in a row count as frames. Without residuals (side
data ``residual``) RPM does nothing and a token's density is its distance from its frame's mean; without packet sizes
(``packet_size``) budgets are equal.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.parameters import AtLeast, In, Layers
from foveate.core.reduction import Reduction
from foveate.core.registry import register
from foveate.core.roles import VISUAL, Item
from foveate.core.shape import Shape
from foveate.core.signal import Rows, Seen, Side, Signal, Site
from foveate.core.state import State
from foveate.core.traits import Traits
from foveate.ops.matching import greedy_pairs, joining
from foveate.ops.select import top_of_groups, top_rows

RESIDUAL, PACKETS = Side("residual", needed=False), Side("packet_size", needed=False)
ENTRY = Site("encoder", 0)
TINY = 1e-6


def density(residual: Tensor, rows: int, columns: int) -> Tensor:
    """``[T, rows, columns]`` how much each patch of ``residual`` ``[T, C, H, W]`` changed, from 0 to 1 in each frame."""
    residual = residual.float()
    mean, std = residual.mean((2, 3), keepdim=True), residual.std((2, 3), keepdim=True, correction=0)
    energy = ((residual - mean) / (std + TINY)).square().sum(1)
    low, high = energy.amin((1, 2), keepdim=True), energy.amax((1, 2), keepdim=True)
    spread = (energy - low) / torch.where(high > low, high - low, 1)
    return functional.adaptive_avg_pool2d(spread[:, None], (rows, columns))[:, 0]


def components(low: Tensor) -> Tensor:
    """``[T, h, w]`` the first cell (raster index) of the patch that each cell belongs to: of its four-neighbour component
    of ``low`` ``[T, h, w]`` (bool), or itself. On the host.
    """
    height, width = low.shape[1:]
    own = torch.arange(height * width).reshape(1, height, width).expand_as(low)
    label, outside = own.masked_fill(~low, height * width), height * width
    while True:
        around = functional.pad(label, (1, 1, 1, 1), value=outside)
        near = torch.stack([around[:, :-2, 1:-1], around[:, 2:, 1:-1], around[:, 1:-1, :-2], around[:, 1:-1, 2:], label])
        found = near.amin(0).masked_fill(~low, outside)
        # A cell's label is a cell of its component: what that one is labelled is as good.
        jumped = functional.pad(found.flatten(1), (0, 1), value=outside)
        found = jumped.gather(1, found.flatten(1)).reshape(low.shape)
        if torch.equal(found, label):
            return torch.where(low, label, own)
        label = found


def frame_budgets(sizes: Sequence[float], total: int, least: int, most: Sequence[int]) -> list[int]:
    """``total`` tokens dealt out to frames: ``least`` for each, the rest by the root of their packets' ``sizes``.

    What is above ``most`` of a frame goes to the others; rounding is settled where the remainders are largest.
    """
    total = min(total, sum(most))
    out, free = dict[int, int](), list(range(len(sizes)))
    while free:
        left = total - sum(out.values())
        floor = min(least, left // len(free))
        root = {t: math.sqrt(sizes[t]) for t in free}
        whole = sum(root.values())
        more = {t: (left - floor * len(free)) * (root[t] / whole if whole else 1 / len(free)) for t in free}
        full = [t for t in free if floor + more[t] >= most[t]]
        if not full:
            rounded = {t: round(more[t]) for t in free}
            missing = left - floor * len(free) - sum(rounded.values())
            step = 1 if missing > 0 else -1
            for t in sorted(free, key=lambda t: (step * (rounded[t] - more[t]), t))[: abs(missing)]:
                rounded[t] += step
            return [out[t] if t in out else floor + rounded[t] for t in range(len(sizes))]
        out |= {t: most[t] for t in full}
        free = [t for t in free if t not in out]
    return [out[t] for t in range(len(sizes))]


@register
@dataclass(frozen=True)
class MeToM(Tokens):
    """Merge what the codec, the tokens and the language model call redundant, in three places. Costs a few host syncs."""

    name = "metom"
    title = "MeToM"
    group = "before_llm"
    paper = "CVPR 2026"
    helps = "Long videos read from a file, whose codec has found out already what changes from frame to frame."
    needs = ("side data: residual, packet_size (optional)", "decoder attention row (3 layers)")
    identity_at = {"tau": 0.0, "budget": 1.0, "tau_tem": 1.0, "rate": 0.0}  # noqa: RUF012

    budget: Annotated[float, In(0, 1)] = 0.5
    """M_v: share of a prompt's visual tokens that are core tokens; those alike across frames are then merged."""
    tau: Annotated[float, In(0, 2)] | None = None
    """Density (0 to 1) below which patches are merged before the encoder; 0 = none, None = so many of each frame that about
    ``budget`` stay apart."""
    tau_tem: Annotated[float, In(-1, 2)] = 0.9
    """Cosine above which core tokens of two frames are merged."""
    frames: Literal["adjacent", "all"] = "adjacent"
    """Which frames of a video are compared: neighbours, or each with each."""
    m_min: Annotated[int, AtLeast(1)] | None = None
    """Core tokens of each frame at least; None = a quarter of an equal share."""
    layers: Annotated[tuple[int, ...], Layers(least=0)] | None = None
    """Decoder layers whose attention is averaged, counted from 0; None = three, up to a third of the depth."""
    rate: Annotated[float, In(0, 1)] = 0.5
    """R: share of the visual tokens that is merged away behind the last of ``layers``."""

    def fitted(self, traits: Traits) -> Self:
        """Three layers that end at a third of the depth."""
        last = max(round(traits.decoder_layers / 3) - 1, 0)
        return replace(self, layers=self.layers or tuple(range(max(last - 2, 0), last + 1)))

    def check(self, traits: Traits) -> str | None:
        """Patches can be merged where they are rows of the encoder; the layers must exist and have attention."""
        reason = traits.refuse_sites("encoder") if self.tau != 0 else None
        if reason is not None:
            return f"tau={self.tau}: merging patches before the encoder {reason}; use tau=0.0, which leaves them alone"
        layers = self.fitted(traits).layers or ()
        return traits.refuse_layers("layers", (layers[-1] + 1,), attention=layers)

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """In front of the encoder's blocks, of the language model, and behind the last of ``layers``."""
        layers = self.fitted(traits).layers or ()
        entry = (ENTRY,) if self.tau != 0 else ()
        return (*entry, Site("sequence"), Site("decoder", layers[-1] + 1))

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """Side data, and the last row of these layers' attention."""
        return (RESIDUAL, PACKETS, *(Rows(Site("decoder", layer)) for layer in self.fitted(traits).layers or ()))

    def workspace(self, shape: Shape) -> int:
        """Tokens at length 1, frame by frame, similarities of frames (a picture each at most) and of what is merged late."""
        return 2 * shape.edits + 6 * shape.floats(shape.hidden) + 6 * shape.pairs + shape.attention(3) + 4 * shape.features

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """One of the three stages."""
        if site == ENTRY:
            return self.merge_patches(layout, seen)
        return self.merge_frames(x, layout, seen) if site.kind == "sequence" else self.merge_ignored(x, layout, seen)

    # RPM.

    def merge_patches(self, layout: Layout, seen: Seen) -> Edit | None:
        """Each component of unchanged patches becomes their mean."""
        pictures = [(row, 0) for row in range(len(layout.items))]
        residuals = seen[RESIDUAL].of(pictures)
        if all(residual is None for residual in residuals):
            return None
        grid = layout.items[0][0]
        known = [row for row, residual in enumerate(residuals) if residual is not None]
        low = self._low(torch.cat([self._density(residuals[row], layout.items[row][0]) for row in known])).cpu()
        cell = layout.ordinal.cpu()
        spare = torch.where(cell < 0, grid.count, cell)
        there = torch.zeros(len(cell), grid.count + 1, dtype=torch.bool).scatter(1, spare, True)[known, : grid.count]
        first = torch.arange(grid.count).repeat(len(cell), 1)
        first[known] = components(low & there.reshape(low.shape)).flatten(1)
        # Rows of cells: where the first cell of each cell's component stands.
        place = torch.arange(layout.shape[1]).expand_as(cell)
        row_of = torch.zeros(len(cell), grid.count + 1, dtype=torch.long).scatter(1, spare, place)
        of_cell = row_of.gather(1, first.gather(1, cell.clamp(min=0)))
        target = torch.where(cell >= 0, of_cell, place).masked_fill(~layout.valid.cpu(), -1)
        gone = ((target != place) & (target >= 0)).sum(1).tolist()
        if not any(gone):
            return None
        return _merged(upload(target, layout.origin.device), layout, gone)

    def _low(self, density: Tensor) -> Tensor:
        """``[T, h, w]`` bool: patches to merge."""
        flat = density.flatten(1)
        tau = flat.quantile(1 - self.budget, dim=1, keepdim=True) if self.tau is None else self.tau
        return (flat < tau).reshape(density.shape)

    def _density(self, residual: Any, item: Item) -> Tensor:
        """``[frames, h, w]`` of an item's grid, of what was handed over with its picture."""
        if not isinstance(residual, Tensor) or residual.ndim not in (3, 4):
            raise FoveateError(f"{self.name}: side data 'residual': must be [3, H, W] of an image, [T, 3, H, W] of a video")
        frames = residual if residual.ndim == 4 else residual[None]
        if len(frames) % item.frames:
            raise FoveateError(
                f"{self.name}: side data 'residual': has {len(frames)} frames for {item.frames} of the model; give those "
                "that the processor was given"
            )
        of_frames = density(frames, item.rows // item.frames, item.columns)
        return of_frames.unflatten(0, (item.frames, -1)).mean(1)  # type: ignore[no-untyped-call, no-any-return]

    # BTM.

    def merge_frames(self, x: Tensor, layout: Layout, seen: Seen) -> Edit | None:
        """Core tokens of each frame, merged across frames; all others are folded into those of their frame."""
        items = [(b, j) for b, grids in enumerate(layout.items) for j in range(len(grids))]
        if not items:
            return None
        videos, frame, score, sizes = self._frames(x, layout, items, seen)
        most = [len(of) for of in videos]
        number = torch.arange(max(most), device=x.device)
        there = (frame[:, None] == number[:, None]).sum(2).tolist()  # tokens of each frame
        wanted = [self._wanted(*of) for of in zip(layout.items, sizes, there)]
        core = top_of_groups(score, frame, wanted)
        groups = [(b, f) for b in range(len(most)) for f in range(most[b])]
        sample = upload([b for b, _ in groups], x.device)
        mine = frame[sample] == upload([f for _, f in groups], x.device)[:, None]
        rows = _table(mine, [there[b][f] for b, f in groups])  # [G, n] rows of each frame, -1 = padding
        place = torch.arange(layout.shape[1], device=x.device).expand(layout.shape)
        target, weight, pairs = self._across(x, core, rows, sample, groups, videos, place)
        gone = [sum(had) - sum(core_tokens) + n for had, core_tokens, n in zip(there, wanted, pairs)]
        if not any(gone):
            return None
        merged = torch.zeros_like(x, dtype=torch.float32)
        merged.scatter_add_(1, target.clamp(min=0)[..., None].expand_as(x), x.float() * (weight * (target >= 0))[..., None])
        # Folding: each frame's other tokens among the (merged) core tokens of that frame.
        index = rows.clamp(min=0)
        unit = functional.normalize(x[sample[:, None], index].float(), dim=2)
        goes = target[sample[:, None], index]
        onto = functional.normalize(merged[sample[:, None], goes], dim=2)
        centre = core[sample[:, None], index] & (rows >= 0)
        best = (unit @ onto.transpose(1, 2)).masked_fill(~centre[:, None], float("-inf")).argmax(2)
        folded = (rows >= 0) & ~centre
        spare = torch.cat([target, target[:, :1]], dim=1)
        spare = spare.index_put(
            (sample[:, None].expand_as(rows), torch.where(folded, rows, layout.shape[1])), goes.gather(1, best)
        )
        target = spare[:, :-1].masked_fill(~layout.valid, -1)
        moves = ~core & (target >= 0) & (target != place)
        members = torch.zeros_like(weight).scatter_add_(1, target.clamp(min=0), moves.float())
        return _merged(target, layout, gone, weight / (1 + members.gather(1, target.clamp(min=0))))

    def _wanted(self, grids: Sequence[Item], sizes: Sequence[float], there: Sequence[int]) -> list[int]:
        """Core tokens of each frame, of those that are there: at least one where there is any."""
        total = self.budget * sum(item.count for item in grids)
        there = there[: len(sizes)]
        least = self.m_min or max(1, int(0.25 * total / max(len(sizes), 1)))
        return frame_budgets(sizes, max(round(total), sum(map(bool, there))), least, there)

    def _frames(
        self, x: Tensor, layout: Layout, items: list[tuple[int, int]], seen: Seen
    ) -> tuple[list[list[int]], Tensor, Tensor, list[list[float]]]:
        """The video of each frame, by sample; frame and density ``[B, N]`` of each token; packet sizes of each frame."""
        videos: list[list[int]] = [[] for _ in layout.items]
        sizes: list[list[float]] = [[] for _ in layout.items]
        starts, per_frame, found = list[int](), list[int](), dict[tuple[int, int], Tensor]()
        before: dict[int, Item] = {}
        for (b, j), residual, packets in zip(items, seen[RESIDUAL].of(items), seen[PACKETS].of(items)):
            item, last = layout.items[b][j], before.get(b)
            goes_on = last is not None and item.frames == last.frames == 1 and _grid(item) == _grid(last)
            video = videos[b][-1] if goes_on else len(videos[b])
            starts.append(len(videos[b]))
            per_frame.append(item.count // item.frames)
            videos[b] += [video] * item.frames
            sizes[b] += self._sizes(packets, item)
            if residual is not None:
                found[b, j] = self._density(residual, item)
            before[b] = item
        first = dict(zip(items, starts))
        tokens = dict(zip(items, per_frame))
        widest = max(map(len, layout.items))
        table = [[(first.get((b, j), 0), tokens.get((b, j), 1)) for j in range(widest)] for b in range(len(layout.items))]
        start, count = (of.gather(1, layout.item.clamp(min=0)) for of in upload(table, x.device).unbind(2))
        visual = layout.ordinal >= 0
        frame = torch.where(visual, start + layout.ordinal.div(count, rounding_mode="floor"), -1)
        score = _remoteness(x, frame, max(map(len, videos)))
        for (b, j), of_cells in self._shown(found).items():
            here = (layout.item[b] == j) & visual[b]
            score[b] = torch.where(here, of_cells.flatten()[layout.ordinal[b].clamp(min=0)], score[b])
        return videos, frame, score, sizes

    def _shown(self, densities: dict[tuple[int, int], Tensor]) -> dict[tuple[int, int], Tensor]:
        """Density by cell; where patches were merged (tiles, all alike), their mean."""
        if self.tau == 0 or not densities:
            return densities
        flat = torch.cat(list(densities.values()))
        first = upload(components(self._low(flat).cpu()).flatten(1), flat.device)
        flat = flat.flatten(1)
        total = torch.zeros_like(flat).scatter_add_(1, first, flat)
        count = torch.zeros_like(flat).scatter_add_(1, first, torch.ones_like(flat))
        return dict(zip(densities, (total / count.clamp(min=1)).gather(1, first)))

    def _sizes(self, packets: Any, item: Item) -> list[float]:
        """Packet size of each of the model's frames."""
        if packets is None:
            return [1.0] * item.frames
        of_frames = torch.as_tensor(packets, dtype=torch.float64).flatten()
        if len(of_frames) % item.frames or bool((of_frames < 0).any()):
            raise FoveateError(
                f"{self.name}: side data 'packet_size': has {len(of_frames)} sizes for {item.frames} frames of the model; "
                "give one, 0 or more, for each frame that the processor was given"
            )
        sizes: list[float] = of_frames.reshape(item.frames, -1).mean(1).tolist()
        return sizes

    def _across(
        self,
        x: Tensor,
        core: Tensor,
        rows: Tensor,
        sample: Tensor,
        groups: list[tuple[int, int]],
        videos: list[list[int]],
        place: Tensor,
    ) -> tuple[Tensor, Tensor, list[int]]:
        """Row that each row goes to, its weight ``[B, N]``, and how many pairs there are of core tokens that are alike."""
        target, weight = place.clone(), torch.ones(place.shape, device=x.device)
        known = {group: number for number, group in enumerate(groups)}
        compared = [
            (known[b, f], known[b, g])
            for b, of in enumerate(videos)
            for f in range(len(of))
            for g in range(f + 1, len(of) if self.frames == "all" else min(f + 2, len(of)))
            if of[f] == of[g]
        ]
        if not compared or self.tau_tem >= 1:
            return target, weight, [0] * len(place)
        index = rows.clamp(min=0)
        centre = core[sample[:, None], index] & (rows >= 0)
        unit = functional.normalize(x[sample[:, None], index].float(), dim=2)
        one, two = upload(compared, x.device).unbind(1)
        alike = unit[one] @ unit[two].transpose(1, 2)
        both = centre[one][:, :, None] & centre[two][:, None]
        number, left, right = ((alike > self.tau_tem) & both).nonzero(as_tuple=True)
        total = place.shape[1]
        a = sample[one[number]] * total + rows[one[number], left]
        b = sample[two[number]] * total + rows[two[number], right]
        # On the host: how many pairs there are depends on the tokens, and so does how often one looks for them.
        first, second, score = torch.stack([a.double(), b.double(), alike[number, left, right].double()]).cpu()
        first, second = first.long(), second.long()
        taken = greedy_pairs(first, second, score, place.numel())
        first, second = first[taken], second[taken]
        a, b = upload(first, x.device), upload(second, x.device)
        target.view(-1).index_copy_(0, b, a % total)
        weight.view(-1).index_fill_(0, torch.cat([a, b]), 0.5)
        return target, weight, torch.bincount(first // total, minlength=len(place)).tolist()

    # MATM.

    def merge_ignored(self, x: Tensor, layout: Layout, seen: Seen) -> Edit | None:
        """The tokens that the last row looks at least join the most similar ones that stay."""
        candidates = layout.rows(*VISUAL) & ~layout.predicting
        open_counts = [
            count - min(pinned, count) for count, pinned in zip(layout.visual, layout.pinned or [0] * len(layout.visual))
        ]
        gone = [min(int(self.rate * count + TINY), max(count - 1, 0)) for count in open_counts]
        if not any(gone):
            return None
        shown = [seen[Rows(Site("decoder", layer))].probabilities()[:, :, -1].mean(1) for layer in self.layers or ()]
        leaves = top_rows(-torch.stack(shown).mean(0), candidates, gone)
        place = torch.arange(layout.shape[1], device=x.device).expand(layout.shape)
        stays = candidates & ~leaves
        unit = functional.normalize(x.float(), dim=2)
        moving = _table(leaves, gone)
        sample = torch.arange(len(x), device=x.device)[:, None]
        near = unit[sample, moving.clamp(min=0)] @ unit.transpose(1, 2)
        best = near.masked_fill(~stays[:, None], float("-inf")).argmax(2)
        spare = torch.cat([place, place[:, :1]], dim=1)
        spare = spare.scatter(1, torch.where(moving >= 0, moving, layout.shape[1]), best)
        return _merged(spare[:, :-1].masked_fill(~layout.valid, -1), layout, gone)


def _grid(item: Item) -> tuple[int, int]:
    return item.rows, item.columns


def _table(mask: Tensor, counts: Sequence[int]) -> Tensor:
    """``[G, n]`` the rows of each ``mask`` ``[G, N]``, -1 = padding."""
    return Reduction.keeping(mask, tuple(counts)).anchor


def _remoteness(x: Tensor, frame: Tensor, frames: int) -> Tensor:
    """``[B, N]`` one minus the cosine of each token with the mean of its frame's."""
    index = torch.where(frame < 0, frames, frame)[..., None].expand_as(x)
    total = torch.zeros(len(x), frames + 1, x.shape[2], device=x.device).scatter_add_(1, index, x.float())
    return 1 - functional.cosine_similarity(x.float(), total.gather(1, index), dim=2)


def _merged(target: Tensor, layout: Layout, gone: Sequence[int], weight: Tensor | None = None) -> Edit:
    """The edit by which rows go to their ``target`` (the mean of all, unless weights are given)."""
    if weight is None:
        members = torch.zeros(target.shape, device=target.device).scatter_add_(1, target.clamp(min=0), (target >= 0).float())
        weight = 1 / members.gather(1, target.clamp(min=0)).clamp(min=1)
    live = tuple(n - g for n, g in zip(layout.live, gone))
    visual = tuple(n - g for n, g in zip(layout.visual, gone))
    return Edit(joining(target, weight, live), live=live, visual=visual)
