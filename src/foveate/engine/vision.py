"""One encoding of pictures under a recipe.

Rows may be dropped or merged anywhere in the encoder. What is short is put back to full length before the model's own code
counts it (packing, splitting, ``generate``'s beams); the sequence site then drops the slots that stayed empty.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Item, Layout, Role
from foveate.core.method import Companion, Tokens
from foveate.core.ranking import looking
from foveate.core.reduction import Reduction
from foveate.core.signal import Aligned, Attention, Columns, Features, QueryKey, Signal, Site, follow, on
from foveate.core.state import State
from foveate.core.step import Step
from foveate.engine import probe
from foveate.engine.clock import Clock
from foveate.engine.program import Program
from foveate.models.anatomy import Anatomy, Encoder, View

Kind = Literal["image", "video"]


@dataclass
class Survivors:
    """The tokens of one view that are alive when the encoder is done.

    Attributes:
        rank: ``[count]`` place of each token among those alive, -1 = gone; None where all live, in raster order.
        count: how many live.
    """

    rank: Tensor | None
    count: int


class Look:
    """One call of ``get_image_features`` or ``get_video_features``.

    Attributes:
        kind: which of the two.
        pictures: what it makes, placeholder by placeholder.
        views: their grids, one after the other.
        survivors: what is left of each view.
        positions: what the last edit said about rotary positions.
        edited: whether anything was dropped or merged.
        steps: what each method saw and did, grids numbered as in `views`; if the session watches.
    """

    def __init__(
        self,
        program: Program,
        anatomy: Anatomy,
        kind: Kind,
        bound: Mapping[str, Any],
        clock: Clock,
        companion: Companion | None,
        seed: int,
    ) -> None:
        self.program, self.anatomy, self.kind, self.clock = program, anatomy, kind, clock
        self.pictures = anatomy.pictures(bound)
        self.views: list[View] = [view for picture in self.pictures for view in picture.views]
        self.survivors = [Survivors(None, view.rows * view.columns) for view in self.views]
        self.positions: Any = "anchor"
        self.text_after: Any = "keep"
        self.edited = False
        self.steps: list[Step] = []
        self._bound, self._companion = bound, companion
        self._state = State()
        self._state.put("session", "seed", seed)
        self._state.put("session", "traits", program.traits)
        self._seen: dict[Signal, Any] = {}
        self._by_view: dict[Signal, dict[int, Any]] = {}
        self._layout: Layout | None = None
        self._bias: Tensor | None = None
        self._rows = 0
        self._kept_cells: Tensor | None = None
        self._pending: Edit | None = None

    # Hooks, in the order in which pictures meet them.

    def before_vision(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Site *patches*."""
        methods = self.program.vision.get(("patches", 0, "before"), ())
        encoder = self.anatomy.encoder
        if not methods or encoder is None or encoder.patches is None:
            return args, kwargs
        grids = [(view.rows, view.columns) for view in self.views]
        longest = max(rows * columns for rows, columns in grids)
        cells = encoder.patches.read(args, kwargs).flatten(1)
        counts = torch.tensor([rows * columns for rows, columns in grids])
        first = counts.cumsum(0) - counts
        place = torch.arange(longest).expand(len(grids), -1)
        there = place < counts[:, None]
        index = (first[:, None] + place).masked_fill(~there, 0).to(cells.device)
        layout = _layout(grids, there.to(cells.device), prefix=0)
        x = cells[index] * there.to(cells.device)[..., None]
        for method in methods:
            edit = self._ask(method, Site("patches"), x, layout, self.program.given, range(len(grids)))
            if edit is None:
                continue
            x, layout = edit.reduction.apply(x), layout.after(edit)
            self._note(edit)
            self._pending = Edit(edit.reduction) if self._pending is None else Edit(edit.reduction @ self._pending.reduction)
        if self._pending is None or encoder.patches.keep is None:
            return args, kwargs
        alive = torch.zeros(len(grids), longest + 1, dtype=torch.bool, device=cells.device)
        alive.scatter_(1, torch.where(layout.valid, layout.ordinal, longest), True)
        self._kept_cells = alive[:, :longest][there.to(cells.device)].nonzero()[:, 0]
        self._pending = None
        for number, (view, mine) in enumerate(zip(self.views, alive[:, :longest])):
            mine = mine[: view.rows * view.columns]
            self.survivors[number] = Survivors(_in_raster_order(mine), layout.visual[number])
        return encoder.patches.keep(args, kwargs, self._kept_cells)

    def after_vision(self, output: Any) -> None:
        """Give back the full length to a tower that encoded some cells only."""
        kept = self._kept_cells
        if kept is None:
            return
        total = sum(view.rows * view.columns for view in self.views)
        for name in ("pooler_output", "deepstack_features"):
            value = getattr(output, name, None)
            if isinstance(value, Tensor):
                output[name] = _spread(value, kept, total)
            elif value is not None:
                output[name] = type(value)(_spread(level, kept, total) for level in value)

    def enter_block(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Site *encoder[layer].before*, and the key bias of merged rows."""
        for signal in self.program.passing:
            if signal.site.layer < layer:
                self._seen.pop(signal, None)
        x = self._sites("encoder", layer, "before", args[0] if args else kwargs["hidden_states"], self._encoder.prefix)
        mask = self._mask(x)
        rest = list(args[1:])
        if mask is not None:
            if rest:
                rest[0] = mask
            else:
                kwargs = dict(kwargs, attention_mask=mask)
        if args:
            return (x, *rest), kwargs
        return (), dict(kwargs, hidden_states=x)

    def middle(self, layer: int, x: Tensor) -> Tensor:
        """Site *encoder[layer].middle*."""
        return self._sites("encoder", layer, "middle", x, self._encoder.prefix)

    def leave_block(self, layer: int, x: Tensor) -> Tensor:
        """Site *encoder[layer].after*."""
        return self._sites("encoder", layer, "after", x, self._encoder.prefix)

    def observe(self, layer: int, query: Tensor, key: Tensor, scale: float, mask: Tensor | None) -> None:
        """Record what the attention of encoder block ``layer`` shows; packed encoders call once for each window."""
        with self.clock.lap("encoder signals"):
            for signal in self.program.encoder_signals[layer]:
                made: Any
                if isinstance(signal, Columns):
                    ragged = self._layout is not None and not self._layout.dense
                    asking = self._layout.valid.to(query.device) if ragged else None
                    made = probe.received(query, key, scale, mask, causal=False, asking=asking)
                elif isinstance(signal, QueryKey):
                    made = (query, key)
                else:
                    logits = probe.row_logits(query[:, :, :1], key, scale)
                    made = Attention(logits, logits.logsumexp(-1))
                if self._encoder.packed:
                    self._seen.setdefault(signal, []).append(made)
                else:
                    self._seen[signal] = made

    def before_projector(self, x: Tensor) -> Tensor:
        """Site *pre_projector*; summary rows are gone."""
        encoder = self._encoder
        if self._layout is not None and encoder.prefix:
            self._layout = _without_prefix(self._layout, encoder.prefix)
        self._strip()
        for signal in self.program.features:
            if isinstance(signal, Features):
                self._seen[signal] = [x] if encoder.packed else x
            elif self._companion is not None:
                with self.clock.lap("encoder signals"):
                    self._seen[signal] = [self._companion.align(x[None])[0]] if encoder.packed else self._companion.align(x)
        if not encoder.packed:
            self._rows = self._rows or x.shape[1]
            x = self._sites("pre_projector", 0, "before", x, 0)
        return x

    def after_projector(self, x: Tensor) -> Tensor:
        """Back to full length."""
        layout = self._layout
        if not self.edited or layout is None:
            return x
        layout = layout.to(x.device)
        full = _dense(x, layout, self._rows)
        for signal, value in on(self._seen, x.device).items():
            if _length(value) == layout.shape[1]:
                self._seen[signal] = _dense_signal(value, layout, self._rows)
        rank, counts = _ranks(layout, self._rows).flatten(), layout.visual
        for number, view in enumerate(self.views):
            fed = self._encoder.fed(view)
            if fed is None or fed.shape[1] != 1:
                raise FoveateError(f"{self.anatomy.family}: its tokens are not rows of the encoder, so none may go in there")
            tile = fed[:, 0].div(self._rows, rounding_mode="floor")
            mine = rank[fed[:, 0].to(x.device)]
            if len(fed) == self._rows and bool((tile == tile[0]).all()):
                self.survivors[number] = Survivors(mine, counts[int(tile[0])])
            else:  # several tiles make one grid: raster order, whatever the order inside of each tile
                alive = mine >= 0
                self.survivors[number] = Survivors(_in_raster_order(alive), int(alive.sum()))
        return full

    def finish(self, output: Any) -> None:
        """Site *projected*: tokens as the language model will get them."""
        self._settle()
        methods = self.program.vision.get(("projected", 0, "before"), ())
        if not methods:
            return
        made = output.pooler_output
        pieces = [made] if isinstance(made, Tensor) else list(made)
        flat = torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])
        for method in methods:
            for members in self._alike().values():
                flat = self._edit_views(method, members, flat)
        sizes = [piece.numel() // piece.shape[-1] for piece in pieces]
        back = [part.reshape(piece.shape) for part, piece in zip(flat.split(sizes), pieces)]
        output["pooler_output"] = back[0] if isinstance(made, Tensor) else type(made)(back)

    # What later sites ask for.

    def gather(self, signal: Signal, views: Sequence[int], ordinal: Tensor) -> Any:
        """A signal of the tokens ``ordinal`` ``[I, n]`` of some views of one grid, by token: ``[I, n, ...]``."""
        edited = self._by_view.get(signal, {})
        if any(view in edited for view in views):
            value: Any = [edited.get(view, self._of_view(signal, view)) for view in views]
            if isinstance(value[0], Attention):
                value = Attention(torch.stack([v.logits for v in value]), torch.stack([v.lse for v in value]))
            else:
                value = torch.stack(value)
        else:
            value = self._of_views(signal, views)
        value = on(value, ordinal.device)
        if isinstance(value, Attention):
            index = ordinal[:, None, None].expand(-1, *value.logits.shape[1:3], -1)
            return Attention(value.logits.gather(3, index), value.lse)
        index = ordinal.reshape(*ordinal.shape, *[1] * (value.ndim - 2)).expand(*ordinal.shape, *value.shape[2:])
        return value.gather(1, index)

    # Inside.

    @property
    def _encoder(self) -> Encoder:
        assert self.anatomy.encoder is not None
        return self.anatomy.encoder

    def _sites(self, kind: str, layer: int, part: str, x: Tensor, prefix: int) -> Tensor:
        methods = self.program.vision.get((kind, layer, part), ())
        pending = self._pending if (kind, layer, part) == ("encoder", 0, "before") else None
        if not methods and pending is None:
            return x
        if self._layout is None:
            side = math.isqrt(x.shape[1] - prefix)
            self._rows = side * side
            there = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
            self._layout = _layout([(side, side)] * x.shape[0], there, prefix)
        self._layout = self._layout.to(x.device)
        if pending is not None:
            self._pending = None
            x = self._apply(_behind_prefix(Edit(pending.reduction.to(x.device)), prefix), x)
        for method in methods:
            seen = {signal: self._now(signal, prefix) for signal in self.program.reads[method]}
            edit = self._ask(method, Site(kind, layer, part), x, self._layout, seen)  # type: ignore[arg-type]
            if edit is not None:
                self._note(edit)
                x = self._apply(edit, x)
        return x

    def _ask(
        self,
        method: Tokens,
        site: Site,
        x: Tensor,
        layout: Layout,
        seen: Mapping[Signal, Any],
        views: Sequence[int] = (),
    ) -> Edit | None:
        """What a method says about rows of ``views``, one for each row of the batch, or of tiles."""
        there = {signal: on(value, x.device) for signal, value in seen.items() if value is not None}
        self._state.to(x.device)
        watching = looking(layout.shape) if self.program.watched else nullcontext()
        with self.clock.lap("encoder signals"), watching as scores:
            edit = method.edit(site, x, layout, there, self._state)
        if edit is not None and scores is not None:
            places = self._places(site, views)
            after = layout.after(edit)
            self.steps.append(Step(method, site, "edit", layout, after, edit.reduction, tuple(scores), places))
        return edit

    def _places(self, site: Site, views: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Where the tokens of ``views``, or of all tiles' views if there are none, stand: row of the batch, raster index."""
        if site.kind in ("patches", "projected"):
            counts = [self.views[view].rows * self.views[view].columns for view in views]
            return {view: (torch.full((n,), row), torch.arange(n)) for row, (view, n) in enumerate(zip(views, counts))}
        fed = [self._encoder.fed(view) for view in self.views]
        return {
            number: (cells[:, 0].div(self._rows, rounding_mode="floor"), cells[:, 0] % self._rows)
            for number, cells in enumerate(fed)
            if cells is not None
        }

    def _note(self, edit: Edit) -> None:
        self.edited = True
        self.positions, self.text_after = edit.positions, edit.text_after

    def _apply(self, edit: Edit, x: Tensor) -> Tensor:
        assert self._layout is not None
        self._layout = self._layout.after(edit)
        self._state.compact(edit.reduction)
        self._seen = {signal: follow(value, edit.reduction) for signal, value in self._seen.items()}
        if edit.key_bias is not None:
            self._bias = edit.key_bias
        elif self._bias is not None:
            self._bias = edit.reduction.take(self._bias.to(x.device))
        return edit.values if edit.values is not None else edit.reduction.apply(x)

    def _mask(self, x: Tensor) -> Tensor | None:
        """``[T, 1, 1, n]`` additive: key bias, and -inf at the padding of ragged images."""
        layout = self._layout
        if layout is None or (self._bias is None and layout.dense):
            return None
        bias = x.new_zeros(layout.shape) if self._bias is None else self._bias.to(x)
        if not layout.dense:
            bias = bias.masked_fill(~layout.valid.to(x.device), torch.finfo(x.dtype).min)
        return bias[:, None, None].expand(-1, -1, x.shape[1], -1)

    def _now(self, signal: Signal, prefix: int) -> Any:
        """A signal as a vision site gets it: by row; patches only, except for queries and keys."""
        if signal in self.program.given:
            return self.program.given[signal]
        value = self._seen.get(signal)
        return value if value is None or not prefix else _strip(value, prefix)

    def _strip(self) -> None:
        """Drop summary columns, which nobody asks for behind the encoder."""
        prefix = self._encoder.prefix
        if prefix:
            self._seen = {signal: _strip(value, prefix) for signal, value in self._seen.items()}

    def _settle(self) -> None:
        """Lay the calls of a packed encoder end to end, in the order of its input."""
        if self.anatomy.encoder is None or not self._encoder.packed:
            return
        order = self._encoder.order(self._bound, 0)
        for signal, calls in self._seen.items():
            if isinstance(signal, Columns):
                rows = torch.cat([call.reshape(-1) for call in calls])
            elif isinstance(signal, Features | Aligned):
                rows = calls[0]
            else:
                continue
            self._seen[signal] = self._in_order(rows, order)

    def _in_order(self, rows: Tensor, order: Tensor | None) -> Tensor:
        """Rows ``[P, ...]`` of a packed encoder in the order of its input; those of cells that were not encoded are zero."""
        cells = [view.cells for view in self.views if view.cells is not None]
        total, group = sum(c.numel() for c in cells), cells[0].shape[1]
        place = torch.arange(total, device=rows.device) if order is None else order.to(rows.device)
        if self._kept_cells is not None:
            kept = self._kept_cells.to(rows.device)
            encoded = torch.zeros(total // group, dtype=torch.bool, device=rows.device).index_fill(0, kept, True)
            place = place[encoded[place // group]]
        elif order is None:
            return rows
        return rows.new_zeros(total, *rows.shape[1:]).index_copy(0, place, rows)

    def _of_view(self, signal: Signal, view: int) -> Any:
        value = self._of_views(signal, [view])
        return Attention(value.logits[0], value.lse[0]) if isinstance(value, Attention) else value[0]

    def _of_views(self, signal: Signal, views: Sequence[int]) -> Any:
        """By token of the full grid: ``[I, count, ...]``, the mean over the patches of each token."""
        fed = isinstance(signal, Features | Aligned) and self.anatomy.encoder is not None and not self._encoder.packed
        cells = [self._encoder.fed(self.views[view]) if fed else self.views[view].cells for view in views]
        known = [c for c in cells if c is not None]
        if len(known) < len(cells):
            raise FoveateError(f"{self.anatomy.family}: encoder signals cannot be told apart by token for this input")
        value = self._seen[signal]
        if len({c.shape[1] for c in known}) > 1:
            apart = [self._of_views(signal, [view]) for view in views]
            if isinstance(value, Attention):
                return Attention(torch.cat([a.logits for a in apart]), torch.cat([a.lse for a in apart]))
            return torch.cat(apart)
        index = torch.stack(known)
        if isinstance(value, Attention):
            # Logits relative to their row's log-sum-exp: each tile has its own.
            logits = (value.logits - value.lse[..., None]).permute(0, 3, 1, 2).flatten(0, 1)
            index = index.to(logits.device)
            logits = logits[index].logsumexp(2) - math.log(index.shape[2])
            return Attention(logits.permute(0, 2, 3, 1), logits.new_zeros(logits.shape[0], *logits.shape[2:]))
        flat = value if self._encoder.packed else value.flatten(0, 1)
        index = index.to(flat.device)
        return flat[index[..., 0]] if index.shape[2] == 1 else flat[index].mean(2)

    def _alike(self) -> dict[tuple[int, int, int], list[int]]:
        """Views of one grid and one number of survivors."""
        groups: dict[tuple[int, int, int], list[int]] = {}
        for number, (view, left) in enumerate(zip(self.views, self.survivors)):
            groups.setdefault((view.rows, view.columns, left.count), []).append(number)
        return groups

    def _edit_views(self, method: Tokens, members: list[int], flat: Tensor) -> Tensor:
        slots = torch.stack([self._slots[number] for number in members]).to(flat.device)  # [I, count] rows of `flat`
        view, count = self.views[members[0]], self.survivors[members[0]].count
        ordinal = torch.stack([self._alive(number, count) for number in members]).to(flat.device)
        rows = slots.gather(1, ordinal)
        items = [(view.rows, view.columns)] * len(members)
        layout = _layout(items, torch.ones_like(rows, dtype=torch.bool), 0, ordinal)
        seen = {s: self.gather(s, members, ordinal) for s in self.program.reads[method] if s in self._seen}
        seen |= self.program.given
        edit = self._ask(method, Site("projected"), flat[rows], layout, seen, members)
        if edit is None:
            return flat
        self._note(edit)
        x = edit.values if edit.values is not None else edit.reduction.apply(flat[rows])
        after = layout.after(edit)
        total = view.rows * view.columns
        full = _dense(x, after, total)
        ranks = _ranks(after, total)
        for place, number in enumerate(members):
            self.survivors[number] = Survivors(ranks[place], after.visual[place])
        for signal in self._seen:
            if isinstance(signal, QueryKey) or signal not in self.program.signals_by_item:
                continue
            value = follow(self.gather(signal, members, ordinal), edit.reduction)
            dense = _dense_signal(value, after, total)
            store = self._by_view.setdefault(signal, {})
            for place, number in enumerate(members):
                one = Attention(dense.logits[place], dense.lse[place]) if isinstance(dense, Attention) else dense[place]
                store[number] = one
        flat = flat.clone()
        flat[slots.flatten()] = full.flatten(0, 1).to(flat.dtype)
        return flat

    def _alive(self, number: int, count: int) -> Tensor:
        """``[count]`` raster indices of a view's survivors, in their order."""
        rank = self.survivors[number].rank
        if rank is None:
            return torch.arange(count)
        spare = torch.where(rank >= 0, rank, len(rank))
        return spare.argsort(stable=True)[:count].cpu()

    @cached_property
    def _slots(self) -> list[Tensor]:
        """For each view, the rows of the features that its tokens are, in raster order."""
        first = itertools.accumulate((picture.count for picture in self.pictures), initial=0)
        return [start + slots for start, picture in zip(first, self.pictures) for slots in picture.slots]


def encoded(encoder: Encoder | None, looks: Sequence[Look]) -> tuple[int, int]:
    """How many pictures (tiles) the encoder was shown, and its rows for the largest one."""
    cells = [view.cells for look in looks for view in look.views if view.cells is not None]
    if encoder is None or not cells:
        return 0, 0
    if encoder.tile is None:
        return len(cells), max(c.numel() for c in cells)
    tiles = sum(max(int(v.cells.max()) for v in look.views if v.cells is not None) // encoder.tile + 1 for look in looks)
    return tiles, encoder.tile + encoder.prefix


def _layout(grids: Sequence[tuple[int, int]], there: Tensor, prefix: int, ordinal: Tensor | None = None) -> Layout:
    """Rows of images: ``prefix`` summary rows, then patches in raster order (or ``ordinal``)."""
    batch, rows = there.shape
    number = torch.arange(rows, device=there.device).expand(batch, -1)
    summary = number < prefix
    role = torch.where(summary, int(Role.CLS), int(Role.IMAGE)).masked_fill(~there, int(Role.PAD))
    cell = number - prefix if ordinal is None else ordinal
    hidden = summary | ~there
    counts = [min(r * c, rows - prefix) for r, c in grids] if ordinal is None else [rows] * batch
    return Layout(
        origin=number,
        role=role,
        item=torch.zeros_like(number).masked_fill(hidden, -1),
        ordinal=cell.masked_fill(hidden, -1),
        positions=number[None],
        size=there.float(),
        items=tuple((Item(r, c, source),) for source, (r, c) in enumerate(grids)),
        live=tuple(count + prefix for count in counts),
        visual=tuple(counts),
    )


def _without_prefix(layout: Layout, prefix: int) -> Layout:
    """The same rows without the summary rows, which stand behind the padding of ragged images."""
    width, live = layout.shape[1] - prefix, tuple(count - prefix for count in layout.live)
    patches = Reduction.keeping(layout.role != Role.CLS, (width,) * layout.shape[0])
    return layout.after(Edit(patches, live=live, visual=layout.visual))


def _behind_prefix(edit: Edit, prefix: int) -> Edit:
    """An edit of patches as one of patches behind summary rows, which stay."""
    reduction = edit.reduction
    if not prefix:
        return edit
    anchor = reduction.anchor
    behind = torch.where(anchor >= 0, anchor + prefix, -1)
    summary = torch.arange(prefix, device=anchor.device).expand(anchor.shape[0], -1)
    # Padding stands in front: summary rows go between it and the patches, by a stable sort of what is padding.
    whole = torch.cat([summary, behind], dim=1)
    order = (whole >= 0).to(torch.uint8).argsort(dim=1, stable=True)
    return Edit(Reduction.gather(whole.gather(1, order), reduction.inputs + prefix))


def _dense(x: Tensor, layout: Layout, rows: int) -> Tensor:
    """Rows ``[I, k, D]`` at their own cells of the full grid ``[I, rows, D]``, zero elsewhere."""
    out = x.new_zeros(x.shape[0], rows + 1, x.shape[2])
    index = torch.where(layout.valid & (layout.ordinal >= 0), layout.ordinal, rows)
    return out.scatter(1, index[..., None].expand_as(x), x)[:, :rows]


def _ranks(layout: Layout, rows: int) -> Tensor:
    """``[I, rows]`` place of each cell of the full grid among those alive, -1 = gone."""
    return _dense(layout.valid.long().cumsum(1)[..., None], layout, rows)[..., 0] - 1


def _in_raster_order(alive: Tensor) -> Tensor:
    """``[n]`` place of each token among those ``alive`` ``[n]`` (bool), -1 = gone."""
    return torch.where(alive, alive.long().cumsum(0) - 1, -1)


def _dense_signal(value: Any, layout: Layout, rows: int) -> Any:
    if isinstance(value, Attention):
        batch, heads, queries, keys = value.logits.shape
        flat = value.logits.permute(0, 3, 1, 2).reshape(batch, keys, heads * queries)
        dense = _dense(flat, layout, rows).reshape(batch, rows, heads, queries).permute(0, 2, 3, 1)
        return Attention(dense, value.lse)
    if isinstance(value, Tensor):
        wide = value if value.ndim == 3 else value[..., None]
        dense = _dense(wide, layout, rows)
        return dense if value.ndim == 3 else dense[..., 0]
    return value


def _length(value: Any) -> int | None:
    """Rows that a signal has."""
    if isinstance(value, Attention):
        return value.logits.shape[-1]
    return value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else None


def _strip(value: Any, prefix: int) -> Any:
    if isinstance(value, Attention):
        return Attention(value.logits[..., prefix:], value.lse)
    return value[:, prefix:] if isinstance(value, Tensor) else value


def _spread(x: Tensor, kept: Tensor, total: int) -> Tensor:
    return x.new_zeros(total, *x.shape[1:]).index_copy(0, kept.to(x.device), x)
