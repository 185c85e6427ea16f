"""One encoding of pictures under a recipe.

Rows may be dropped or merged anywhere in the encoder. What is short is put back to full length before the model's own code
counts it (packing, splitting, ``generate``'s beams); the sequence site then drops the slots that stayed empty.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.method import Tokens
from foveate.core.reduction import Reduction
from foveate.core.signal import Side, Signal, Site, on
from foveate.core.state import State
from foveate.core.step import Step
from foveate.engine import grids
from foveate.engine.clock import Clock
from foveate.engine.films import Beside, joined
from foveate.engine.program import Program
from foveate.engine.reuse import Chain
from foveate.engine.side import ByItem, by_view
from foveate.engine.tower import Tower
from foveate.engine.vision_signals import PictureSignals
from foveate.models.anatomy import View

Kind = Literal["image", "video"]


class Look:
    """One call of ``get_image_features`` or ``get_video_features``.

    Attributes:
        kind: which of the two.
        pictures: what it makes, placeholder by placeholder; of frames that are pictures (`foveate.engine.films`) the videos.
        views: their grids, one after the other.
        survivors: what is left of each view.
        positions: what the last edit said about rotary positions.
        edited: whether anything was dropped or merged; ``acted``: by which methods.
        side: side data of each view.
        memory: of the stream that is open, as it is after this call.
        chain: which frames take part of their way from which, if any do.
        steps: what each method saw and did, grids numbered as in `views`; if the session watches.
        encoded: how many pictures (tiles) the encoder was shown, and its rows for the largest one.
    """

    def __init__(
        self,
        program: Program,
        kind: Kind,
        bound: Mapping[str, Any],
        clock: Clock,
        beside: Beside,
    ) -> None:
        self.program, self.kind, self.clock = program, kind, clock
        self.pictures = program.anatomy.pictures(bound)
        filmed = kind == "image" and bool(beside.films)
        if filmed:
            self.pictures = joined(self.pictures, beside.films)
        self.views: list[View] = [view for picture in self.pictures for view in picture.views]
        self.side = by_view(program, kind, beside.side.get(kind, {}), self.pictures)
        self.survivors = [grids.Survivors(None, view.rows * view.columns) for view in self.views]
        self.positions: Any = "anchor"
        self.text_after: Any = "keep"
        self.edited = False
        self.acted: set[Any] = set()
        self.steps: list[Step] = []
        self.signals = PictureSignals(program, self.views, clock)
        self._bound: Mapping[str, Any] = bound
        self.memory = None if beside.memory is None else beside.memory.draft()
        self._state = State(program.constants, self.memory)
        self.chain = Chain.of(program, "video" if filmed else kind, self.pictures, self.memory, clock, self.acted)
        self._towers = Tower.all_of(program.anatomy)
        self._kept_cells: Tensor | None = None
        self._pending: Edit | None = None

    # Places, in the order in which pictures meet them.

    def before_vision(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Site *patches*."""
        methods = self.program.vision.get(("patches", 0, "before"), ())
        encoder = self.program.anatomy.encoder
        if not (methods or self.program.pixels) or encoder is None or encoder.patches is None:
            return args, kwargs
        shapes = [(view.rows, view.columns, view.frames) for view in self.views]
        longest = max(rows * columns for rows, columns, _ in shapes)
        cells = encoder.patches.read(args, kwargs).flatten(1)
        self.signals.pixels = cells if self.program.pixels else None
        counts = torch.tensor([rows * columns for rows, columns, _ in shapes])
        first = counts.cumsum(0) - counts
        place = torch.arange(longest).expand(len(shapes), -1)
        there = place < counts[:, None]
        index = upload((first[:, None] + place).masked_fill(~there, 0), cells.device)
        there = upload(there, cells.device)
        layout = grids.picture_layout(shapes, there, prefix=0)
        x = cells[index] * there[..., None]
        for method in methods:
            edit = self._ask(method, Site("patches"), x, layout, self.program.given, range(len(shapes)))
            if edit is None:
                continue
            x, layout = edit.reduction.apply(x), layout.after(edit)
            self._note(edit)
            whole = edit.reduction if self._pending is None else edit.reduction @ self._pending.reduction
            self._pending = Edit(whole, live=layout.live, visual=layout.visual)
        if self._pending is None or encoder.patches.keep is None:
            return args, kwargs
        alive = torch.zeros(len(shapes), longest + 1, dtype=torch.bool, device=cells.device)
        alive = alive.scatter(1, torch.where(layout.valid, layout.ordinal, longest), True)[:, :longest]
        kept = Reduction.keeping(alive.reshape(1, -1), (sum(layout.live),)).anchor[0]
        self._kept_cells = self.signals.kept_cells = index.flatten()[kept]
        self._pending = None
        for number, (view, mine) in enumerate(zip(self.views, alive)):
            mine = mine[: view.rows * view.columns]
            self.survivors[number] = grids.Survivors(grids.in_raster_order(mine), layout.visual[number])
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
                output[name] = grids.spread(value, kept, total)
            elif value is not None:
                output[name] = type(value)(grids.spread(level, kept, total) for level in value)

    def enter_block(
        self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Site *encoder[layer].before*, and the key bias of merged rows."""
        self.signals.forget_before(layer)
        tower = self._tower(layer)
        x = args[0] if args else kwargs["hidden_states"]
        x = self._sites("encoder", layer, "before", x, tower, tower.encoder.prefix)
        mask = tower.mask(x)
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
        tower = self._tower(layer)
        return self._sites("encoder", layer, "middle", x, tower, tower.encoder.prefix)

    def leave_block(self, layer: int, x: Tensor) -> Tensor:
        """Site *encoder[layer].after*."""
        tower = self._tower(layer)
        encoder = tower.encoder
        x = self._sites("encoder", layer, "after", x, tower, encoder.prefix)
        if self.program.summary and layer == encoder.feature_layer:
            layout, prefix = tower.layout, encoder.prefix
            self.signals.summary = (
                x[:, :prefix] if layout is None else grids.summary_rows(layout.to(x.device), prefix).take(x)
            )
        return x

    def observe(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None) -> None:
        """What the attention of encoder block ``layer`` shows."""
        layout = self._tower(layer).layout
        asking = layout.valid.to(query.device) if layout is not None and not layout.dense else None
        self.signals.observe(layer, query, key, value, scale, mask, asking)

    def before_projector(self, x: Tensor, number: int = 0) -> Tensor:
        """Site *pre_projector* of the encoder of that number; summary rows are gone."""
        tower = self._towers[number]
        encoder, layout = tower.encoder, tower.layout
        if encoder.prefix:
            self.signals.drop_summary(encoder.prefix, None if layout is None else layout.to(x.device))
            tower.layout = None if layout is None else grids.without_prefix(layout, encoder.prefix)
        self.signals.observe_features(x, self.program.companion)
        if not encoder.packed:
            tower.rows = tower.rows or x.shape[1]
            x = self._sites("pre_projector", 0, "before", x, tower, 0)
        return x

    def after_projector(self, x: Tensor, number: int = 0) -> Tensor:
        """Back to full length."""
        tower = self._towers[number]
        layout, self.signals.summary = tower.layout, None
        if not self.edited or layout is None:
            return x
        layout = layout.to(x.device)
        full = grids.dense(x, layout, tower.rows)
        self.signals.refill(layout, tower.rows, x.device)
        known = tower.fed(self.views)
        fed = [cells[:, 0] for cells in known.values() if cells is not None and cells.shape[1] == 1]
        if len(fed) < len(known):
            family = self.program.anatomy.family
            raise FoveateError(f"{family}: its tokens are not rows of the encoder, so none may go in there")
        rank = grids.ranks(layout, tower.rows).flatten()[upload(torch.cat(fed), x.device)]
        for view, left in zip(known, grids.survivors(rank, fed, tower.rows, layout.visual)):
            self.survivors[view] = left
        return full

    def finish(self, output: Any) -> None:
        """Site *projected*: tokens as the language model will get them."""
        self.signals.settle(self._bound)
        self._bound = {}  # pixels and all
        methods = self.program.vision.get(("projected", 0, "before"), ())
        if not methods:
            return
        made = output.pooler_output
        pieces = [made] if isinstance(made, Tensor) else list(made)
        flat = torch.cat([piece.reshape(-1, piece.shape[-1]) for piece in pieces])
        for method in methods:
            for members in grids.alike(self.views, self.survivors):
                flat = self._edit_views(method, members, flat)
        sizes = [piece.numel() // piece.shape[-1] for piece in pieces]
        back = [part.reshape(piece.shape) for part, piece in zip(flat.split(sizes), pieces)]
        output["pooler_output"] = back[0] if isinstance(made, Tensor) else type(made)(back)

    @property
    def encoded(self) -> tuple[int, int]:
        """How many pictures (tiles) the encoder was shown, and its rows for the largest one."""
        return grids.encoded(self.program.anatomy.encoder, self.views)

    # Inside.

    def _tower(self, layer: int) -> Tower:
        """The encoder that a block is of."""
        return next(tower for tower in reversed(self._towers) if tower.first <= layer)

    def _sites(self, kind: str, layer: int, part: str, x: Tensor, tower: Tower, prefix: int) -> Tensor:
        methods = self.program.vision.get((kind, layer, part), ())
        pending = self._pending if (kind, layer, part) == ("encoder", 0, "before") else None
        if not methods and pending is None:
            return x
        tower.begin(x, prefix)
        if pending is not None:
            self._pending = None
            x = self._apply(tower, grids.behind_prefix(pending, prefix, x.device), x)
        for method in methods:
            seen = {signal: self.signals.now(signal, prefix) for signal in self.program.reads[method]}
            edit = self._ask(method, Site(kind, layer, part), x, tower.begin(x, prefix), seen)  # type: ignore[arg-type]
            if edit is not None:
                self._note(edit)
                x = self._apply(tower, edit, x)
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
        there |= {s: self._handed(s, site, views) for s in self.program.reads[method] if isinstance(s, Side)}
        self._state.to(x.device)
        with self.clock.lap("encoder signals"), self.program.watching(layout) as scores:
            edit = method.edit(site, x, layout, there, self._state)
        self.acted |= {method} if edit is not None else set()
        if edit is not None and scores is not None:
            places = self._places(site, views)
            after = layout.after(edit)
            self.steps.append(Step(method, site, "edit", layout, after, edit.reduction, tuple(scores), places))
        return edit

    def _handed(self, signal: Side, site: Site, views: Sequence[int]) -> ByItem:
        """Side data of the pictures that the rows of the batch show."""
        places = self._places(site, views).items()
        shown = {row: view for view, (rows, _) in places for row in rows.unique().tolist()}
        return ByItem(self.side[signal], lambda row, _: shown[row])

    def _places(self, site: Site, views: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
        """Where the tokens of ``views``, or of all tiles' views if there are none, stand: row of the batch, raster index."""
        if site.kind in ("patches", "projected"):
            counts = [self.views[view].rows * self.views[view].columns for view in views]
            return {view: (torch.full((n,), row), torch.arange(n)) for row, (view, n) in enumerate(zip(views, counts))}
        tower = self._tower(site.layer)
        return {
            number: (cells[:, 0].div(tower.rows, rounding_mode="floor"), cells[:, 0] % tower.rows)
            for number, cells in tower.fed(self.views).items()
            if cells is not None
        }

    def _note(self, edit: Edit) -> None:
        self.edited = True
        self.positions, self.text_after = edit.positions, edit.text_after

    def _apply(self, tower: Tower, edit: Edit, x: Tensor) -> Tensor:
        self._state.compact(edit.reduction)
        self.signals.edit(edit.reduction)
        return tower.apply(edit, x)

    def _edit_views(self, method: Tokens, members: list[int], flat: Tensor) -> Tensor:
        slots = upload(torch.stack([self._slots[number] for number in members]), flat.device)  # [I, count] rows of `flat`
        view = self.views[members[0]]
        ordinal = torch.stack([self.survivors[number].ordinal(flat.device) for number in members])
        rows = slots.gather(1, ordinal)
        items = [(view.rows, view.columns, view.frames)] * len(members)
        layout = grids.picture_layout(items, torch.ones_like(rows, dtype=torch.bool), 0, ordinal)
        seen = {s: self.signals.gather(s, members, ordinal) for s in self.program.reads[method] if s in self.signals}
        seen |= self.program.given
        edit = self._ask(method, Site("projected"), flat[rows], layout, seen, members)
        if edit is None:
            return flat
        self._note(edit)
        x = edit.values if edit.values is not None else edit.reduction.apply(flat[rows])
        after = layout.after(edit)
        total = view.rows * view.columns
        full = grids.dense(x, after, total)
        ranks = grids.ranks(after, total)
        for place, number in enumerate(members):
            self.survivors[number] = grids.Survivors(ranks[place], after.visual[place])
        self.signals.edited(members, ordinal, edit.reduction, after, total)
        flat = flat.clone()
        flat[slots.flatten()] = full.flatten(0, 1).to(flat.dtype)
        return flat

    @cached_property
    def _slots(self) -> list[Tensor]:
        """For each view, the rows of the features that its tokens are, in raster order."""
        first = itertools.accumulate((picture.count for picture in self.pictures), initial=0)
        return [start + slots for start, picture in zip(first, self.pictures) for slots in picture.slots]
