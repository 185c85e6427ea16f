"""StreamingLLM: keep the first cached entries, which attention leans on whatever they say, and the latest ones.

Paper: "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453. Once a prompt is read its cache is cut
to the budget, and every step of decoding evicts the oldest entry behind the first ones: the cache stays at its size.
``steps=False`` is NVIDIA/kvpress, where what is generated stays. The budget is kvpress', first entries inside (the released
code holds 4 + 512). ``positions="index"`` is the published form, in which positions are places in the cache: only keys of
the first entries are turned, which move up to the others as entries between go; to attention that is the same. In a stream
positions are always closed up, on each axis by itself, and the budget is beside the text in front of the first picture.
Differs from the released code: a step evicts one entry, so that a later turn's rows, where nothing of them is chosen, stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import Tensor

from foveate.core.bounded import Bounded, Held, Turned
from foveate.core.budget import Budget
from foveate.core.device import upload
from foveate.core.layout import Layout
from foveate.core.method import Kept
from foveate.core.parameters import AtLeast, Keep
from foveate.core.ranking import ranked
from foveate.core.registry import register
from foveate.core.shape import Shape
from foveate.core.signal import Function, Seen, Signal
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable
from foveate.methods.kv_cache.entries import best_entries, last_entries
from foveate.ops.ranks import closed_up


def first_and_last(valid: Tensor, sinks: Sequence[int], counts: Sequence[int]) -> Tensor:
    """``[B, n]`` bool: the first ``sinks[b]`` of the ``valid`` ones ``[B, n]``, and the last ones, ``counts[b]`` in all."""
    first = valid & (valid.cumsum(1) <= upload(sinks, valid.device)[:, None])
    return first | last_entries(valid, [count - sink for count, sink in zip(counts, sinks)])


@register
@dataclass(frozen=True)
class StreamingLLM(Bounded):
    """Keep the first entries and the latest ones."""

    name = "streamingllm"
    title = "StreamingLLM"
    group = "kv_cache"
    paper = "arXiv 2309.17453"
    helps = "Answers and streams without end, where only the latest matters: nothing is scored; a common baseline."
    needs = ("cache ownership",)
    identity_at = {"keep": 1.0, "steps": False}  # noqa: RUF012

    keep: Annotated[int | float, Keep()] = 0.5
    """Share of the prompt's entries, text and pictures alike, or how many of them, that stays in every layer; in a stream,
    entries behind the text in front.
    """
    sinks: Annotated[int, AtLeast(0)] = 4
    """First entries that stay, as many of them as leave room for the last."""
    steps: bool = True
    """Whether each step of decoding evicts an entry, once there are as many as may be; if not, what is generated stays."""
    positions: Literal["original", "index"] = "original"
    """Whether entries keep their rotary positions (kvpress), or the gap behind the first ones is closed up (``"index"``)."""

    def check(self, traits: Traits) -> str | None:
        """Places in the cache number one axis."""
        if self.positions == "index" and traits.rotary_rows > 1:
            return f"positions='index': {traits.family} has multi-row rotary positions; use 'original'"
        return None

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """How keys are turned, where they are."""
        layers = [n for n in range(traits.decoder_layers) if n not in traits.recurrent and n not in traits.sliding]
        names: tuple[Literal["rotate", "unrotate"], ...] = ("rotate", "unrotate") if self.positions == "index" else ()
        return tuple(Function(name, layer) for layer in layers for name in names)

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """How many first entries stay."""
        return {"sinks": (0, 4, 16)}

    def workspace(self, shape: Shape) -> int:
        """Which entries all layers hold, and the cache of a layer while it shrinks."""
        return shape.edits + (shape.layers + 4) * shape.ids + 2 * shape.keys

    @property
    def stepwise(self) -> bool:
        """Where nothing goes in steps, tokens can be taken back."""
        return self.steps

    @property
    def layer_by_layer(self) -> bool:
        """The budget is the same for all layers."""
        return True

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """``[B, 1, n]``: 1 for what stays, 0 for what goes."""
        counts = [self._budget.of(live) for live in layout.live]
        stays = first_and_last(layout.valid, [self._first(count) for count in counts], counts)
        return ranked(stays.to(torch.float32)[:, None])

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Kept | None]:
        """The first entries and the last."""
        return [None if score is None else self._kept(score, layout) for score, layout in zip(scores, layouts)]

    def step(self, layer: int, prompt: int, held: int, tokens: int, length: int) -> int | None:
        """The oldest entry behind the first ones goes; a budget that is a share is one of the prompt."""
        most = self.keep if isinstance(self.keep, int) else prompt
        return self._first(most) if held >= most else None

    def _kept(self, score: Tensor, layout: Layout) -> Kept | None:
        counts = tuple(self._budget.of(live) for live in layout.live)
        leading = tuple(map(self._first, counts)) if self.positions == "index" else None
        if counts == layout.live and not (leading and self.steps):
            return None
        return Kept(best_entries(score, layout.valid, counts), counts=counts, leading=leading)

    @property
    def _budget(self) -> Budget:
        return Budget(self.keep, "floor")

    def _first(self, count: int) -> int:
        """First entries out of so many that stay."""
        return min(self.sinks, count - 1)

    # A stream.

    @property
    def capacity(self) -> int:
        """The budget, which must be a count."""
        self.require(isinstance(self.keep, int), "keep", "a stream has no length to take a share of; give a count")
        return int(self.keep)

    def guidance(self, said: tuple[str, str] | None) -> tuple[str, ...]:
        """Nothing is read."""
        return ()

    def retain(self, held: Sequence[Held], turned: Turned, limit: int | None) -> list[Held]:
        """The prefix, first entries behind it if it is shorter than they are to be, and the last ones, closed up."""
        return [self._left(number, layer, turned) for number, layer in enumerate(held)]

    def _left(self, number: int, held: Held, turned: Turned) -> Held:
        entries = torch.arange(held.keys.shape[2], device=held.keys.device)
        count = min(self.capacity, len(entries) - held.prefix)
        first = held.prefix + min(max(self.sinks - held.prefix, 0), max(count - 1, 0))
        stay = torch.cat([entries[:first], entries[len(entries) - (count + held.prefix - first) :]])
        old = held.positions[:, stay]
        new = closed_up(old, held.prefix)
        return Held(turned(number, held.keys[:, :, stay], old, new), held.values[:, :, stay], new, held.prefix)
