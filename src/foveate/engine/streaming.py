"""The cache of a stream: chunks of pictures are read onto it, and its owner keeps it within bounds.

Between two chunks nobody knows how long a stream has run: what the layers hold counts as the last tokens of a conversation
that is no longer than the fullest of them, so masks and ledgers stay as small as the cache. Rotary positions are told the
model with every chunk and question.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from foveate.core.bounded import Bounded, Held
from foveate.core.errors import FoveateError
from foveate.core.method import Cache
from foveate.core.signal import Function
from foveate.engine.cache import FoveateLayer
from foveate.engine.call import Call
from foveate.engine.functions import function
from foveate.engine.ledger import Ledger
from foveate.engine.run import Run
from foveate.engine.session import Session


class StreamCache:
    """What has been read of a stream. A copy goes on by itself, as nothing in it is changed in place.

    Attributes:
        cache: keys and values.
        next: rotary position of what comes next.
        owner: the method that bounds it, if there is one.
    """

    def __init__(self, session: Session) -> None:
        """For a session whose recipe can run a stream.

        Raises:
            FoveateError: if the model's layers cannot go on for ever, or the recipe's owner of the cache stores it by head.
        """
        parts, program = session.anatomy, session._program
        _check(session)
        self._session, self._parts = session, parts
        self.owner = program.cache if isinstance(program.cache, Bounded) else None
        self.cache = DynamicCache(config=parts.config)
        self.next = 0
        self._prefix = 0
        self._positions: list[Tensor] = []
        self._limit = getattr(parts.config, "max_position_embeddings", None)
        if self.owner is not None:
            self.owner.capacity  # noqa: B018  # refuses budgets that are none
        pairs = [(Function("rotate", n), Function("unrotate", n)) for n in range(len(parts.layers))]
        self._turns = [tuple(function(parts, each) for each in pair) for pair in pairs] if self.owner else []

    @property
    def entries(self) -> int:
        """Entries of the layer that holds most."""
        return max((int(layer.keys.shape[2]) for layer in self._filled), default=0)

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return sum(layer.keys.nbytes + layer.values.nbytes for layer in self._filled)

    @property
    def overflows(self) -> bool:
        """Whether `compress` has anything to do."""
        return self.owner is not None and self.entries - self._prefix > self.owner.capacity

    def read(self, inputs: Mapping[str, Any], positions: Tensor) -> None:
        """Read a chunk: what the model is called with, and its positions ``[R, 1, n]``, counted from the chunk's start."""
        positions, cache = positions + self.next, self.fork()
        with self._calling(_Reading) as calls:
            self._model(inputs, positions, cache)
        self.cache = cache
        written = calls[0].written or [positions[:, 0]] * len(self._parts.layers)
        joined = zip(self._positions or [positions[:, 0, :0]] * len(written), written)
        self._positions = [torch.cat([before, now.to(before.device)], dim=1) for before, now in joined]
        self.next = 1 + int(torch.stack([part.max() for part in written]).max())
        if not self._prefix:
            self._prefix = self.entries  # the text in front comes first, in a chunk of its own
        self._forget()

    def compress(self, texts: list[Tensor]) -> None:
        """Let the owner say what stays, given the ids ``[1, n]`` of its guiding texts."""
        assert self.owner is not None
        masses = [self._guided(ids) for ids in texts]
        layers: list[Any] = self.cache.layers
        held = [
            Held(layer.keys, layer.values, self._positions[number], self._prefix, tuple(mass[number] for mass in masses))
            for number, layer in enumerate(layers)
        ]
        left = self.owner.retain(held, self._turned, self._limit)
        self.cache = self.fork()
        layers = self.cache.layers
        self._positions = [each.positions for each in left]
        self.next = 1 + int(torch.stack([each.positions.max() for each in left]).max())
        seen = max(each.keys.shape[2] for each in left)
        for layer, each in zip(layers, left):
            layer.keys, layer.values = each.keys, each.values
            layer.ledger = _last(layer, seen, torch.arange(layer.columns, device=layer.keys.device)[None] >= self._prefix)

    def fork(self) -> DynamicCache:
        """A cache that goes on from here while this one stays as it is."""
        other = DynamicCache(config=self._parts.config)
        layers: list[Any] = [copy.copy(layer) for layer in self.cache.layers]
        for layer in layers:
            # Stepwise eviction writes in place; all else makes new tensors.
            if isinstance(layer, FoveateLayer) and (layer.eviction is not None or layer.tally is not None):
                layer.keys, layer.values = torch.clone(layer.keys), torch.clone(layer.values)
                layer.eviction = copy.deepcopy(layer.eviction)
        other.layers = layers
        return other

    def asked(self, ids: Tensor) -> dict[str, Any]:
        """What ``generate`` is to be called with to answer the question ``ids`` ``[1, n]`` about what was read so far."""
        cache = self.fork()
        past = cache.get_seq_length()
        # What was read has ids of its own no more; that of the question's first word is as good as any.
        whole = torch.cat([ids[:, :1].expand(-1, past), ids], dim=1)
        positions = torch.nn.functional.pad(self._following(ids), (past, 0))
        return {
            "input_ids": whole,
            "attention_mask": torch.ones_like(whole),
            "position_ids": self._given(positions),
            "past_key_values": cache,
        }

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Meanwhile a question is read as it is: what was kept for it is not chosen anew."""
        with self._calling(_StreamCall):
            yield

    # Inside.

    @property
    def _filled(self) -> list[Any]:
        return [layer for layer in self.cache.layers if getattr(layer, "keys", None) is not None]

    def _model(self, inputs: Mapping[str, Any], positions: Tensor, cache: DynamicCache) -> None:
        given = {**inputs, "position_ids": self._given(positions), "past_key_values": cache}
        self._parts.model(**given, use_cache=True, logits_to_keep=1)

    def _following(self, ids: Tensor) -> Tensor:
        """``[R, 1, n]`` positions of the words ``ids`` ``[1, n]`` if they come next."""
        positions = torch.arange(self.next, self.next + ids.shape[1], device=ids.device)
        return positions.expand(3 if self._parts.rotary_rows > 1 else 1, 1, -1)

    def _given(self, positions: Tensor) -> Tensor:
        """Positions ``[R, 1, n]`` as the model takes them."""
        return positions if self._parts.rotary_rows > 1 else positions[0]

    @contextmanager
    def _calling(self, kind: type[_StreamCall]) -> Iterator[list[Any]]:
        """Calls of the model are of this kind meanwhile; gives the list of them."""
        seat, made = self._session._seat, list[Any]()
        before = seat.calls

        def make(*args: Any, **kwargs: Any) -> Call:
            made.append(kind(*args, **kwargs))
            return made[-1]  # type: ignore[no-any-return]

        seat.calls = make
        try:
            yield made
        finally:
            seat.calls = before

    def _guided(self, ids: Tensor) -> list[Tensor]:
        """Of each layer the attention ``[n]`` that a text gives to its entries."""
        held = [layer.keys.shape[2] for layer in self._filled]
        with self._calling(_Guiding) as calls:
            self._model({"input_ids": ids}, self._following(ids), self.fork())
        return [mass[0, :count] for mass, count in zip(calls[0].masses, held)]

    def _turned(self, layer: int, keys: Tensor, old: Tensor, new: Tensor) -> Tensor:
        rotate, unrotate = self._turns[layer]
        turned = rotate(unrotate(keys.float(), old[:, None]), new[:, None])
        return turned.to(keys.dtype)  # type: ignore[no-any-return]

    def _forget(self) -> None:
        """What the layers hold counts as the last tokens of a conversation as long as the fullest of them."""
        layers: list[Any] = [layer for layer in self.cache.layers if isinstance(layer, FoveateLayer)]
        if all(layer.ledger.complete for layer in layers):
            return
        seen = self.entries
        for layer in layers:
            ledger = layer.ledger
            layer.ledger = _last(layer, seen, ledger.is_visual(ledger.tokens(1, layer.keys.device))[:, 0])


def _last(layer: Any, seen: int, visual: Tensor) -> Ledger:
    """A layer's entries, of which ``visual`` ``[1, n]`` are, as the last of ``seen`` tokens."""
    count = layer.columns
    visual = torch.nn.functional.pad(visual, (seen - count, 0))
    if count == seen:
        return Ledger(tail=seen, visual=visual)
    return Ledger(torch.arange(seen - count, seen, device=layer.keys.device)[None, None], seen, visual=visual)


class _StreamCall(Call):
    """A call under which the owner of a stream's cache chooses nothing by itself."""

    def _begin(self, *args: Any, **kwargs: Any) -> tuple[Run, dict[str, Any]]:
        run, kwargs = super()._begin(*args, **kwargs)
        keeping = run.keeping
        if isinstance(self._program.cache, Bounded):
            keeping.scoring = isinstance(self, _Guiding)
        else:
            keeping.scoring = keeping.scoring and run.rows.has_pictures
        return run, kwargs


class _Reading(_StreamCall):
    """Reads a chunk. ``written``: of each layer the positions ``[R, n]`` of the rows that it wrote."""

    written: list[Tensor] | None = None

    def _end(self, recording: Any, run: Run, output: Any, note: bool) -> None:
        super()._end(recording, run, output, note)
        self.written = [layout.positions[-3:, 0] for layout in run.keeping.cached]


class _Guiding(_StreamCall):
    """Reads a guiding text. ``masses``: of each layer what its owner makes of the attention, ``[1, n]``."""

    masses: list[Any]

    def _end(self, recording: Any, run: Run, output: Any, note: bool) -> None:
        self.masses, run.keeping.scoring = run.keeping.scores, False
        super()._end(recording, run, output, note)


def _check(session: Session) -> None:
    parts, traits, owner = session.anatomy, session._program.traits, session._program.cache
    for kind, layers in (("sliding attention", traits.sliding), ("a recurrent state", traits.recurrent)):
        if layers:
            raise FoveateError(
                f"stream: decoder layer {layers[0]} of {parts.family} has {kind}, which a stream cannot go on with; use a "
                "model with full attention in every layer, such as qwen2_5_vl or llava_onevision"
            )
    if owner is not None and (owner.by_head or type(owner).pack is not Cache.pack):
        raise FoveateError(f"stream: {owner} puts entries into a store, which grows no more; use hermes(keep=...)")
