"""Cache layers that know which tokens they hold.

``generate`` counts the tokens that a cache has *seen* to decide which tokens are new; attention needs to know which are
still *there*. A `FoveateLayer` answers both, so that a second turn, or a continued one, is fed exactly its new tokens.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
)

from foveate.core.errors import FoveateError
from foveate.ops.ragged import Blocks


@dataclass(frozen=True)
class Ledger:
    """Which tokens of the conversation the entries of a cache layer are.

    Entries are those of ``prefix``, then ``tail`` consecutive tokens from number ``start`` on.

    Attributes:
        prefix: ``[B, 1 or Hkv, n]`` token numbers, -1 = padding; None where nothing was ever removed.
        start: number of the first token of the tail.
        tail: entries in the tail.
        holes: whether the prefix has padding.
        shift: ``[B]`` by how much later tokens move down in rotary position, None = not at all.
        blocked: how many of the prefix' columns are kept in blocks by head instead of in the dense tensors.
        visual: ``[B, L]`` bool: which of the first L tokens of the conversation are visual, None = none.
    """

    prefix: Tensor | None = None
    start: int = 0
    tail: int = 0
    holes: bool = False
    shift: Tensor | None = None
    blocked: int = 0
    visual: Tensor | None = None

    @property
    def seen(self) -> int:
        """Tokens that the layer has been shown."""
        return self.start + self.tail

    @property
    def consecutive(self) -> bool:
        """Whether the entries are consecutive tokens, as in a plain cache."""
        return self.prefix is None

    @property
    def complete(self) -> bool:
        """Whether every token seen is there."""
        return self.consecutive and self.start == 0

    def tokens(self, batch: int, device: torch.device) -> Tensor:
        """``[B, 1 or Hkv, n]`` token numbers of all entries."""
        tail = torch.arange(self.start, self.seen, device=device)
        if self.prefix is None:
            return tail.expand(batch, 1, -1)
        return torch.cat([self.prefix.to(device), tail.expand(*self.prefix.shape[:2], -1)], dim=-1)

    def is_visual(self, tokens: Tensor) -> Tensor:
        """Which of ``tokens`` ``[B, h, n]`` are visual."""
        if self.visual is None or not self.visual.shape[1]:
            return torch.zeros_like(tokens, dtype=torch.bool)
        visual = self.visual.to(tokens.device)[:, None].expand(-1, tokens.shape[1], -1)
        known = (tokens >= 0) & (tokens < visual.shape[2])
        return known & visual.gather(2, tokens.clamp(0, visual.shape[2] - 1))

    def extended(self, count: int) -> Ledger:
        """With the next ``count`` tokens."""
        return replace(self, tail=self.tail + count)

    def appended(self, tokens: Tensor, seen: int, holes: bool, shift: Tensor | None) -> Ledger:
        """With the entries ``tokens`` ``[B, n]`` (-1 = padding) out of those up to number ``seen``."""
        old = self.tokens(tokens.shape[0], tokens.device)
        new = tokens[:, None].expand(-1, old.shape[1], -1)
        prefix = torch.cat([old, new], dim=-1)
        return replace(self, prefix=prefix, start=seen, tail=0, holes=self.holes or holes, shift=shift)

    def kept(self, entries: Tensor, holes: bool) -> Ledger:
        """With the entries ``[B, Hkv or 1, k]`` only (-1 = padding, if there are ``holes``), and what lies in blocks."""
        tokens = self.tokens(entries.shape[0], entries.device)
        if self.blocked:
            early = torch.arange(self.blocked, device=entries.device).expand(*entries.shape[:2], -1)
            entries = torch.cat([early, torch.where(entries >= 0, entries + self.blocked, -1)], dim=-1)
        heads = max(tokens.shape[1], entries.shape[1])
        entries = entries.expand(-1, heads, -1)
        prefix = tokens.expand(-1, heads, -1).gather(2, entries.clamp(min=0)).masked_fill(entries < 0, -1)
        return replace(self, prefix=prefix, start=self.seen, tail=0, holes=holes)

    def without(self, entry: int, batch: int, device: torch.device) -> Ledger:
        """With one entry less."""
        tokens = self.tokens(batch, device)
        prefix = torch.cat([tokens[..., :entry], tokens[..., entry + 1 :]], dim=-1)
        return replace(self, prefix=prefix, start=self.seen, tail=0)

    def last(self, count: int) -> Ledger:
        """With the last ``count`` entries only."""
        if count <= self.tail:
            return replace(self, prefix=None, start=self.seen - count, tail=count, holes=False)
        if self.prefix is None:
            return self
        return replace(self, prefix=self.prefix[..., -(count - self.tail) :])

    def cropped(self, count: int) -> Ledger:
        """Without the last ``count`` tokens."""
        if count > self.tail:
            raise FoveateError(f"crop({count}): only the {self.tail} tokens after the compressed prompt can be taken back")
        return replace(self, tail=self.tail - count)

    def batched(self, index: Tensor) -> Ledger:
        """With the batch entries ``index``."""
        prefix = None if self.prefix is None else self.prefix.index_select(0, index.to(self.prefix.device))
        shift = None if self.shift is None else self.shift.index_select(0, index.to(self.shift.device))
        visual = None if self.visual is None else self.visual.index_select(0, index.to(self.visual.device))
        return replace(self, prefix=prefix, shift=shift, visual=visual)


EMPTY = Ledger()


class Owner(Protocol):
    """Who builds masks for a compressed cache."""

    attached: bool


@dataclass
class _Full:
    """The whole cache, set aside while decoding reads a view of it."""

    keys: Tensor
    values: Tensor
    ledger: Ledger


class FoveateLayer(DynamicLayer):
    """A dynamic cache layer whose entries need not be consecutive tokens.

    Without an attached session it works while nothing was removed, and refuses otherwise instead of mis-masking.

    Attributes:
        ledger: which tokens the entries are that attention reads.
        blocks: entries by head, where heads keep different numbers; ``keys`` and ``values`` are then those that came later.
        prompt, spare, length: entries left of the prompt, padding in front of them, tokens of the prompt: of each sample,
            where a method evicts step by step.
        prompt_tokens: length of the prompt, padding included.
        record_past: whether what leaves the sliding window stays until the next `crop`.
    """

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.ledger = EMPTY
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.blocks: Blocks | None = None
        self.prompt: tuple[int, ...] | None = None
        self.spare: tuple[int, ...] = ()
        self.length: tuple[int, ...] = ()
        self.prompt_tokens = 0
        self.record_past = False
        self._full: _Full | None = None
        self._evicting: int | None = None
        self._owner: Any = lambda: None

    @classmethod
    def adopting(cls, layer: DynamicLayer) -> FoveateLayer:
        """With the contents of a plain layer."""
        new = cls(getattr(layer, "sliding_window", None))
        new.record_past = getattr(layer, "record_past", False)
        if layer.is_initialized and layer.keys is not None and layer.keys.numel():
            new.lazy_initialization(layer.keys, layer.values)
            new.keys, new.values = layer.keys, layer.values
            count = layer.keys.shape[-2]
            new.ledger = Ledger(start=layer.get_seq_length() - count, tail=count)
        return new

    def own(self, owner: Owner) -> None:
        """Let ``owner``, which must keep `ledger` up to date, drive this layer."""
        self._owner = weakref.ref(owner)

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, a view's own copies included."""
        if not isinstance(getattr(self, "keys", None), Tensor):
            return 0
        full = 0 if self._full is None else self._full.keys.nbytes + self._full.values.nbytes
        return int(self.keys.nbytes + self.values.nbytes + full) + (0 if self.blocks is None else self.blocks.nbytes)

    @property
    def whole(self) -> Ledger:
        """Which tokens are there, whatever is read of them."""
        return self.ledger if self._full is None else self._full.ledger.extended(self.ledger.tail)

    @property
    def held(self) -> float:
        """Entries that attention reads, on average over samples and heads (read from the device where they are ragged)."""
        early = 0.0 if self.blocks is None else float(self.blocks.there.sum()) / (self.keys.shape[0] * self.keys.shape[1])
        return self.keys.shape[2] + early

    def activate_past_recording(self) -> None:
        """From now on `crop` may take tokens back behind which the sliding window has moved on."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append; the owner accounts for the entries, without one they are the next tokens."""
        if self._evicting is None:
            super().update(key_states, value_states)
        else:  # in one copy
            slot, self._evicting = self._evicting, None
            self.keys = torch.cat([self.keys[:, :, :slot], self.keys[:, :, slot + 1 :], key_states], dim=2)
            self.values = torch.cat([self.values[:, :, :slot], self.values[:, :, slot + 1 :], value_states], dim=2)
        keys, values = self.keys, self.values
        if not self._owned:
            self._refuse_unless_consecutive()
            self.ledger = self.ledger.extended(key_states.shape[-2])
            self.settle()
        return keys, values

    def settle(self) -> None:
        """Once attention has run: let go of what has left the sliding window."""
        if not self.record_past:
            self._slide()

    def keep(self, entries: Tensor, holes: bool) -> None:
        """Evict all but ``entries`` ``[B, Hkv or 1, k]`` (-1 = padding, if there are ``holes``)."""
        self.keys, self.values = _gather(self.keys, entries), _gather(self.values, entries)
        self.ledger = self.ledger.kept(entries, holes)

    def keep_ragged(self, entries: Tensor, counts: Sequence[Sequence[int]]) -> None:
        """Evict all but ``entries`` ``[B, Hkv, k]`` (-1 = none), ``counts[b][h]`` of a head, and store them by head."""
        entries = entries[..., entries.shape[2] - max(map(max, counts)) :]
        self.blocks = Blocks.of(self.keys, self.values, entries, counts)
        self.keys, self.values = self.keys[:, :, :0], self.values[:, :, :0]
        self.ledger = replace(self.ledger.kept(entries, False), blocked=entries.shape[2])

    def evict(self, slots: Sequence[int | None]) -> None:
        """Evict one entry, counted from each sample's first, of the samples where there is one to evict.

        Where it is the same one of all samples it goes when the next `update` copies the cache anyway.
        """
        width = self.keys.shape[2]
        if len(set(slots)) == 1 and slots[0] is not None and not any(self.spare):
            self._evicting = slots[0]
            self.ledger = self.ledger.without(slots[0], len(slots), self.keys.device)
            return
        kept = [
            [entry for entry in range(spare, width) if slot is None or entry != spare + slot]
            for spare, slot in zip(self.spare, slots)
        ]
        longest = max(map(len, kept))
        self.spare = tuple(longest - len(entries) for entries in kept)
        index = [[-1] * spare + entries for spare, entries in zip(self.spare, kept)]
        self.keep(torch.tensor(index, device=self.keys.device)[:, None], holes=any(self.spare) or self.ledger.holes)

    def look(self, entries: Tensor, holes: bool) -> None:
        """Let attention read ``entries`` ``[B, 1, k]`` and what comes later only; the rest stays, set aside."""
        self._full = _Full(self.keys, self.values, self.ledger)
        self.keep(entries, holes)

    def look_up(self) -> None:
        """Let attention read everything again."""
        if self._full is None:
            return
        full, new = self._full, self.ledger.tail
        self._full = None
        self.keys = torch.cat([full.keys, self.keys[:, :, self.keys.shape[2] - new :]], dim=2)
        self.values = torch.cat([full.values, self.values[:, :, self.values.shape[2] - new :]], dim=2)
        self.ledger = full.ledger.extended(new)

    def get_seq_length(self) -> int:
        """Tokens seen."""
        return self.ledger.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Under a session, as if every token were there: the session picks the columns of those that are."""
        if self._owned:
            return self.ledger.seen + query_length, 0
        self._refuse_unless_consecutive()
        return self.ledger.tail + query_length, self.ledger.start

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.ledger, self.blocks, self.prompt, self._full = EMPTY, None, None, None

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: a negative number of them, or (older transformers) the length to cut to."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.ledger.seen - tokens_to_remove, 0)
        if count and self.is_initialized:
            self.ledger = self.ledger.cropped(count)
            self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
        if self.is_initialized:
            self._slide()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._batched(beam_idx)  # among the beams of one sample, so the host's numbers stay

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self._batched(indices, indices.tolist() if self.prompt is not None else ())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        batch = torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._batched(batch, batch.tolist() if self.prompt is not None else ())

    def _slide(self) -> None:
        if self.sliding_window is not None and self.keys.shape[-2] >= self.sliding_window:
            self.keys = self.keys[:, :, -self.sliding_window + 1 :]
            self.values = self.values[:, :, -self.sliding_window + 1 :]
            self.ledger = self.ledger.last(self.sliding_window - 1)

    def _batched(self, index: Tensor, samples: Sequence[int] = ()) -> None:
        """What lies beside keys and values follows; the host's numbers follow ``samples``."""
        self.ledger = self.ledger.batched(index)
        if self.blocks is not None:
            self.blocks = self.blocks.batched(index)
        if self._full is not None:
            keys, values = (x.index_select(0, index.to(x.device)) for x in (self._full.keys, self._full.values))
            self._full = _Full(keys, values, self._full.ledger.batched(index))
        if self.prompt is not None and samples:
            self.prompt, self.spare, self.length = (
                tuple(of[sample] for sample in samples) for of in (self.prompt, self.spare, self.length)
            )

    @property
    def _owned(self) -> bool:
        owner = self._owner()
        return owner is not None and owner.attached

    def _refuse_unless_consecutive(self) -> None:
        if not self.ledger.consecutive:
            raise FoveateError(
                "past_key_values: this cache was compressed under a Foveate session that has ended; "
                "attach a recipe before going on with it, or start with a new cache"
            )


def _gather(stored: Tensor, entries: Tensor) -> Tensor:
    """Entries ``[B, Hkv or 1, k]`` of ``[B, Hkv, n, d]``."""
    index = entries.clamp(min=0)[..., None].expand(-1, stored.shape[1], -1, stored.shape[-1])
    return stored.gather(2, index)


def adopt(cache: Cache, count: int, owner: Owner) -> list[Any]:
    """Replace, in place, the attention layers of a dynamic cache by `FoveateLayer`, ``count`` layers in all.

    They keep what they hold. Layers with a recurrent state stay as they are.

    Raises:
        FoveateError: for static, quantized and offloaded caches, with the remedy.
    """
    if type(cache) is not DynamicCache or getattr(cache, "offloading", False):
        raise FoveateError(
            f"past_key_values: {type(cache).__name__} cannot shrink; use a DynamicCache (cache_implementation=None)"
        )
    for layer in cache.layers:
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer, FoveateLayer, LinearAttentionLayer):
            raise FoveateError(f"past_key_values: layers of {type(layer).__name__} are not supported; use a DynamicCache")
    missing = [DynamicLayer() for _ in range(count - len(cache.layers))]
    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    cache.layers = [FoveateLayer.adopting(layer) if type(layer) in plain else layer for layer in [*cache.layers, *missing]]
    for layer in cache.layers:
        if isinstance(layer, FoveateLayer):
            layer.own(owner)
    return cache.layers
