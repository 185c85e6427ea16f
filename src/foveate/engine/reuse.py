"""Encoder blocks that run for some rows of a frame and take the others from an earlier frame (`foveate.core.reuse`).

Which frame takes from which is known before the first block. So all frames that run whole go through a block at once, and
then all others: each needs what its own reference got in this very block, and nothing of its neighbours.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from foveate.core.device import upload
from foveate.core.errors import FoveateError
from foveate.core.reuse import Reuse
from foveate.core.stream import Memory
from foveate.engine import blocks
from foveate.engine.clock import Clock
from foveate.engine.program import Program
from foveate.models.anatomy import Encoder, Halves, Picture
from foveate.models.taps import function_of

Block = tuple[Tensor, Tensor, Tensor, Tensor]
"""Of some frames in one block, each ``[F, n, D]``: keys, values, what attention gave, what the MLP gave."""


class Chain:
    """Which frames of one call of the encoder run whole, and what the others take from which.

    Frames of one *lane* are of one video (of one tile, if a stream's pictures come in several), in order. Of each lane a
    stream's memory holds the reference that its next frame needs.
    """

    def __init__(
        self, method: Reuse, lanes: Sequence[Sequence[int]], memory: Memory | None, clock: Clock, acted: set[Any]
    ) -> None:
        self._method, self._lanes, self._memory, self._clock = method, lanes, memory, clock
        self._acted, self._planned = acted, False
        self.whole: list[int] = []
        self.part: list[int] = []
        self._source: list[int] = []
        self._held: list[int] = []
        self._kept: dict[int, int] = {}
        self._at: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    @classmethod
    def of(
        cls,
        program: Program,
        kind: Literal["image", "video"],
        pictures: Sequence[Picture],
        memory: Memory | None,
        clock: Clock,
        acted: set[Any],
    ) -> Chain | None:
        """How the frames of ``pictures`` (or videos) hang together, None if each runs whole and nobody remembers it.

        Raises:
            FoveateError: if there are several videos, of which one goes on with the stream of ``memory``.
        """
        if memory is not None and kind == "video" and len(pictures) > 1:
            raise FoveateError(
                f"streaming: a call that encodes {len(pictures)} videos; give it one, the next frames of the stream"
            )
        method, encoder = program.reuse, program.anatomy.encoder
        if method is None or encoder is None or (kind == "image" and memory is None):
            return None
        if kind == "video":
            counts = [view.frames for picture in pictures for view in picture.views]
            lanes = [list(range(end - count, end)) for count, end in zip(counts, itertools.accumulate(counts))]
        else:
            tiles = _tiles(encoder, pictures)
            lanes = [[of[lane] for of in tiles if lane < len(of)] for lane in range(max(map(len, tiles), default=0))]
        return cls(method, lanes, memory, clock, acted)

    def run(self, layer: int, parts: Halves, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Run a block, which ``parts`` are of, on the frames ``x`` ``[F, n, D]``."""
        if not self._planned:
            self._plan(x.shape[0], x.shape[1])
        if x.device not in self._at:
            whole, part, source = (upload(rows, x.device, torch.long) for rows in (self.whole, self.part, self._source))
            self._at[x.device] = whole, part, source
        whole, part, source = self._at[x.device]
        out, bank = torch.empty_like(x), []
        if self.whole:
            own, y = _whole(parts, x[whole], _of(mask, whole))
            out, bank = out.index_copy_(0, whole, y), [own]
        if self.part:
            bank += [self._recall(layer, lane, x.device) for lane in self._held]
            key, value, attended, mixed = (torch.cat(each)[source] for each in zip(*bank))
            choose = functools.partial(self._stale, layer)
            y = _part(parts, x[part], _of(mask, part), (key, value, attended, mixed), choose)
            out = out.index_copy_(0, part, y)
        if self._memory is not None:
            for lane, place in self._kept.items():
                self._memory.put(self._method, (lane, layer), tuple(each[place].detach().clone() for each in bank[0]))
        return out

    def _plan(self, frames: int, rows: int) -> None:
        """Sort out ``frames`` of ``rows`` rows, and see to the lanes of the memory."""
        method, memory = self._method, self._memory
        place: dict[int, int] = {}  # of frames that run whole, among these
        sources: list[tuple[int, int | None]] = []  # of the others: lane, and frame of this call or None for the memory's
        self._planned = True
        for lane, of in enumerate(self._lanes):
            begun, held, width = (0, None, rows) if memory is None else memory.get(method, lane, (0, None, rows))
            if width != rows:  # pictures of another size
                begun, held = 0, None
            for number, frame in enumerate(of, begun):
                wanted = method.reference(number)
                here = of[wanted - begun] if wanted >= begun else None
                if wanted == number or (here not in place if here is not None else wanted != held):
                    place[frame] = len(self.whole)
                    self.whole.append(frame)
                else:
                    self.part.append(frame)
                    sources.append((lane, here))
            if memory is not None:
                then = begun + len(of)
                wanted = method.reference(then)
                if begun <= wanted < then and of[wanted - begun] in place:
                    self._kept[lane], held = place[of[wanted - begun]], wanted
                memory.put(method, lane, (then, held, rows))
        self._held = sorted({lane for lane, frame in sources if frame is None})
        behind = {lane: len(self.whole) + number for number, lane in enumerate(self._held)}
        self._source = [behind[lane] if frame is None else place[frame] for lane, frame in sources]
        if sorted(self.whole + self.part) != list(range(frames)):
            raise FoveateError(f"{method.name}: {len(self.whole + self.part)} frames were expected, and {frames} came")
        self._acted |= {method} if self.part else set()

    def _stale(self, layer: int, keys: Tensor, reference: Tensor) -> Tensor:
        with self._clock.lap("encoder signals"):
            return self._method.stale(layer, keys, reference)

    def _recall(self, layer: int, lane: int, device: torch.device) -> Block:
        assert self._memory is not None
        block: Sequence[Tensor] = self._memory.get(self._method, (lane, layer))
        key, value, attended, mixed = (each[None].to(device) for each in block)
        return key, value, attended, mixed


def _tiles(encoder: Encoder, pictures: Sequence[Picture]) -> list[list[int]]:
    """The tiles of each picture, counted over all."""
    if encoder.tile is None:  # each tile is a picture of its own
        return [[number] for number in range(len(pictures))]
    found = []
    for picture in pictures:
        cells = torch.cat([view.cells.flatten() for view in picture.views if view.cells is not None])
        found.append(sorted(set(cells.div(encoder.tile, rounding_mode="floor").tolist())))
    return found


def install(block: nn.Module, encoder: Encoder, layer: int, now: Callable[[], Chain | None]) -> Callable[[], None]:
    """Let a block run in part, if the call that goes on has a `Chain`; returns what undoes it.

    Raises:
        FoveateError: if taking the block apart does not give its bits, or something else stands in for its forward.
    """
    halves, checking = encoder.halves, True
    assert halves is not None

    def forward(block: nn.Module, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        there = now()
        if there is None and not checking:
            return original(*args, **kwargs)
        x, *more = args or (kwargs["hidden_states"],)
        mask = more[0] if more else kwargs.get("attention_mask")
        parts = halves(block)  # anew each time: accelerate may only now have loaded the block's own parameters
        return _whole(parts, x, mask)[1] if there is None else there.run(layer, parts, x, mask)

    undo = blocks.inside(block, halves(block).norm1, "its rows cannot run in part", forward)
    checking = False
    return undo


def _whole(parts: Halves, x: Tensor, mask: Tensor | None) -> tuple[Block, Tensor]:
    """Frames that run whole: what others may take from them, and what the block makes of them."""
    made, normed = parts.projections, parts.norm1(x)
    query, key, value = made.query(normed), made.key(normed), made.value(normed)
    attended = _attend(parts, query, key, value, mask)
    x = x + _scaled(parts.scale1, attended)
    mixed = parts.mlp(parts.norm2(x))
    return (key, value, attended, mixed), x + _scaled(parts.scale2, mixed)


def _part(
    parts: Halves, x: Tensor, mask: Tensor | None, reference: Block, choose: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Frames of which run the rows that ``choose`` names, given their keys and their references'."""
    made, normed = parts.projections, parts.norm1(x)
    key = made.key(normed)
    stale = choose(key, reference[0])
    index = stale[..., None].expand(-1, -1, x.shape[2])
    normed = normed.gather(1, index)
    value = reference[1].scatter(1, index, made.value(normed))
    if mask is not None and mask.shape[2] > 1:
        mask = mask.gather(2, stale[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    attended = _attend(parts, made.query(normed), key, value, mask)
    x = x + _scaled(parts.scale1, reference[2].scatter(1, index, attended))
    mixed = parts.mlp(parts.norm2(x.gather(1, index)))
    return x + _scaled(parts.scale2, reference[3].scatter(1, index, mixed))


def _attend(parts: Halves, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """``[F, q, D]`` attention of some rows over all, by the module's own function."""
    module: Any = parts.attention
    heads = (each.reshape(*each.shape[:2], -1, module.head_dim).transpose(1, 2) for each in (query, key, value))
    made = function_of(module)(module, *heads, mask, dropout=0.0, scaling=module.scale, is_causal=False)[0]
    return parts.projections.output(made.flatten(2).contiguous())


def _scaled(scale: Tensor | None, x: Tensor) -> Tensor:
    return x if scale is None else scale * x


def _of(mask: Tensor | None, frames: Tensor) -> Tensor | None:
    """The attention mask of some frames."""
    if mask is None:
        return None
    if mask.ndim != 4:
        raise FoveateError("attention: frames with padding cannot run in part under FlashAttention; use sdpa")
    return mask[frames.to(mask.device)] if mask.shape[0] > 1 else mask
