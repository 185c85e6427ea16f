"""Cache layers that know which tokens they hold.

``generate`` counts the tokens that a cache has been shown to decide which tokens are new; attention needs to know which are
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
from foveate.core.store import Store
from foveate.engine.eviction import Eviction
from foveate.engine.ledger import EMPTY, Ledger


class Owner(Protocol):
    """Who builds masks for a compressed cache."""

    attached: bool
    reference: weakref.ref[Any]
    """To itself, the same one always."""


@dataclass
class _Full:
    """The whole cache, set aside while decoding reads a part of it."""

    keys: Tensor
    values: Tensor
    ledger: Ledger


class FoveateLayer(DynamicLayer):
    """A dynamic cache layer whose entries need not be consecutive tokens.

    Without an attached session it works while nothing was removed, and refuses otherwise instead of mis-masking.

    Attributes:
        store: entries in a form of their own (heads that keep different numbers, factors, few bits), which all later queries
            see; ``keys`` and ``values`` are then the others.
        eviction: where entries lie while a method evicts step by step, None where none does.
        record_past: whether what leaves the sliding window stays until the next `crop`.
    """

    def __init__(self, sliding_window: int | None = None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.is_sliding = sliding_window is not None
        self.store: Store | None = None
        self.eviction: Eviction | None = None
        self.record_past = False
        self._ledger, self._columns = EMPTY, 0
        self._full: _Full | None = None
        self._own_prefix = False
        self._writing: tuple[Tensor, bool] | None = None
        self._owner: Any = None

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
        """Let ``owner`` build the masks for this layer."""
        self._owner = owner.reference

    @property
    def columns(self) -> int:
        """Entries in the dense tensors."""
        return self.keys.shape[-2] if self.is_initialized and self.keys is not None and self.keys.ndim > 2 else 0

    @property
    def ledger(self) -> Ledger:
        """Which tokens the entries are that attention reads."""
        # Steps of decoding append without a word to the ledger: what came since is consecutive.
        columns = self.columns
        if columns > self._columns:
            self._ledger, self._columns = self._ledger.extended(columns - self._columns), columns
        return self._ledger

    @ledger.setter
    def ledger(self, ledger: Ledger) -> None:
        self._ledger, self._columns = ledger, self.columns

    def announce(self, ledger: Ledger, rows: int) -> None:
        """The ledger as it is once ``rows`` entries more have come."""
        self._ledger, self._columns = ledger, self.columns + rows

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, copies that are only read included."""
        if not isinstance(getattr(self, "keys", None), Tensor):
            return 0
        full = 0 if self._full is None else self._full.keys.nbytes + self._full.values.nbytes
        return int(self.keys.nbytes + self.values.nbytes + full) + (0 if self.store is None else self.store.nbytes)

    @property
    def whole(self) -> Ledger:
        """Which tokens are there, whatever is read of them."""
        return self.ledger if self._full is None else self._full.ledger.extended(self.ledger.tail)

    @property
    def writes(self) -> bool:
        """Whether the next entry takes a place among the others."""
        return self._writing is not None

    @property
    def held(self) -> float:
        """Entries that attention reads, on average over samples and heads (read from the device where they are ragged)."""
        return self.keys.shape[2] + (0.0 if self.store is None else self.store.held)

    def activate_past_recording(self) -> None:
        """From now on `crop` may take tokens back behind which the sliding window has moved on."""
        self.record_past = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append."""
        if self._writing is not None:
            (places, grows), self._writing = self._writing, None
            if grows:
                DynamicLayer.update(self, key_states, value_states)
            index = places[:, None, None, None].expand(key_states.shape)
            self.keys, self.values = self.keys.scatter_(2, index, key_states), self.values.scatter_(2, index, value_states)
            self.ledger = replace(self._ledger, start=self._ledger.start + 1)
            return self.keys, self.values
        keys, values = DynamicLayer.update(self, key_states, value_states)
        owner = self._owner and self._owner()  # not `_owned`: a call less in every layer of every step
        if owner is None or not owner.attached:
            self.refuse_unless_consecutive()
            self.settle()
        return keys, values

    def settle(self) -> None:
        """Once attention has run: let go of what has left the sliding window."""
        if not self.record_past:
            self._slide()

    def keep(self, entries: Tensor, holes: bool, ledger: Ledger | None = None) -> None:
        """Evict all but ``entries`` ``[B, Hkv or 1, k]`` (-1 = padding, if there are ``holes``).

        ``ledger``: the one that says so, where another layer has made it already.
        """
        kept = self.ledger.kept(entries, holes) if ledger is None else ledger
        self.keys, self.values = _gather(self.keys, entries), _gather(self.values, entries)
        self.ledger = kept

    def pack(self, store: Store, rest: Tensor, ledger: Ledger) -> None:
        """Evict all but what is in ``store`` from now on and the entries ``rest`` ``[B, Hkv or 1, k]``, as in ``ledger``."""
        self.keys, self.values = _gather(self.keys, rest), _gather(self.values, rest)
        self.store, self.ledger = store, ledger

    def write_to(self, places: Tensor, grows: bool) -> None:
        """The next entry of each sample goes to ``places`` ``[B]``; ``grows``: some of them behind the others."""
        ledger = self.ledger
        tokens = ledger.prefix
        if tokens is None or ledger.tail or not self._own_prefix:
            tokens, self._own_prefix = ledger.tokens(len(places), self.keys.device).clone(), True
        if grows:
            tokens = torch.nn.functional.pad(tokens, (0, 1), value=-1)
        index = places[:, None, None].expand(-1, tokens.shape[1], 1)
        holes = self.eviction is not None and self.eviction.gaps
        self._ledger = replace(ledger, prefix=tokens.scatter_(2, index, ledger.past), start=ledger.past, tail=0, holes=holes)
        self._writing = places, grows

    def narrow(self, entries: Tensor, holes: bool) -> None:
        """Let attention read ``entries`` ``[B, 1, k]`` and what comes later only; the rest stays, set aside."""
        self._full = _Full(self.keys, self.values, self.ledger)
        self.keep(entries, holes)

    def widen(self) -> None:
        """Let attention read everything again."""
        if self._full is None:
            return
        full, new = self._full, self.ledger.tail
        self._full = None
        self.keys = torch.cat([full.keys, self.keys[:, :, self.keys.shape[2] - new :]], dim=2)
        self.values = torch.cat([full.values, self.values[:, :, self.values.shape[2] - new :]], dim=2)
        self.ledger = full.ledger.extended(new)

    def get_seq_length(self) -> int:
        """Tokens that it was shown."""
        return self.ledger.past

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Under a session, as if every token were there: the session picks the columns of those that are."""
        ledger = self.ledger
        if self._owned:
            return ledger.past + query_length, 0
        self.refuse_unless_consecutive()
        return ledger.tail + query_length, ledger.start

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.store, self.eviction, self._full = None, None, None
        self.ledger = EMPTY

    def crop(self, tokens_to_remove: int) -> None:
        """Take tokens back: a negative number of them, or (older transformers) the length to cut to."""
        count = -tokens_to_remove if tokens_to_remove <= 0 else max(self.ledger.past - tokens_to_remove, 0)
        if count and self.is_initialized:
            ledger = self.ledger.cropped(count)
            self.keys, self.values = self.keys[:, :, :-count], self.values[:, :, :-count]
            self.ledger = ledger
        if self.is_initialized:
            self._slide()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Follow the beams."""
        super().reorder_cache(beam_idx)
        self._batched(beam_idx)  # among the beams of one sample, so the host's numbers stay

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some samples."""
        super().batch_select_indices(indices)
        self._batched(indices, indices.tolist() if self.eviction is not None else ())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every sample."""
        batch = torch.arange(self.keys.shape[0], device=self.keys.device).repeat_interleave(repeats)
        super().batch_repeat_interleave(repeats)
        self._batched(batch, batch.tolist() if self.eviction is not None else ())

    def refuse_unless_consecutive(self) -> None:
        """One clear line where a plain model would take the entries for other tokens than they are."""
        if not self.ledger.consecutive:
            raise FoveateError(
                "past_key_values: this cache was compressed under a Foveate session that has ended; "
                "attach a recipe before going on with it, or start with a new cache"
            )

    def __getstate__(self) -> dict[str, Any]:
        """For copies and files: who owns it is not part of it."""
        return {**self.__dict__, "_owner": None}

    def _slide(self) -> None:
        if self.sliding_window is not None and self.keys.shape[-2] >= self.sliding_window:
            ledger = self.ledger.last(self.sliding_window - 1)
            self.keys = self.keys[:, :, -self.sliding_window + 1 :]
            self.values = self.values[:, :, -self.sliding_window + 1 :]
            self.ledger = ledger

    def _batched(self, index: Tensor, samples: Sequence[int] = ()) -> None:
        """What lies beside keys and values follows; the host's numbers follow ``samples``."""
        self.ledger = self.ledger.batched(index)
        if self.store is not None:
            self.store = self.store.batched(index)
        if self._full is not None:
            keys, values = (x.index_select(0, index.to(x.device)) for x in (self._full.keys, self._full.values))
            self._full = _Full(keys, values, self._full.ledger.batched(index))
        if self.eviction is not None and samples:
            self.eviction.select(samples)

    @property
    def _owned(self) -> bool:
        owner = self._owner and self._owner()
        return owner is not None and owner.attached


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
    if type(cache) is not DynamicCache:
        raise FoveateError(
            f"past_key_values: {type(cache).__name__} cannot shrink; use a DynamicCache (cache_implementation=None)"
        )
    if getattr(cache, "offloading", False):
        raise FoveateError(
            "past_key_values: an offloaded DynamicCache moves its layers away while they are compressed; use "
            "DynamicCache(offloading=False) (cache_implementation='dynamic')"
        )
    mine = owner.reference
    if len(cache.layers) >= count and all([type(c) is FoveateLayer and c._owner is mine for c in cache.layers]):
        return cache.layers
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
