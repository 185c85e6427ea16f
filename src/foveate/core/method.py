"""The protocols: the ways in which a published system may act on a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol, Self

import torch
from torch import Tensor

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.budget import Budget
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout, Role
from foveate.core.layout import Positions as Positions
from foveate.core.ranking import about
from foveate.core.shape import Shape
from foveate.core.signal import ByItem, Question, Seen, Signal, Site
from foveate.core.state import State
from foveate.core.tunable import Tunable


@dataclass(frozen=True)
class Traits:
    """What a method may know of a model when it is attached.

    Attributes:
        family: the model family.
        decoder_layers: layers of the language model.
        encoder_layers: blocks of the vision encoder, or None where its signals cannot be read.
        feature_layer: block of the encoder whose output feeds the projector.
        has_cls: whether the encoder has a CLS token.
        rotary_rows: rows of the rotary positions (1; 3 or 4 for M-RoPE).
        mask_free: whether the attention kernel takes no 4-D mask (FlashAttention).
        fingerprint: what artifacts are bound to.
        artifacts: calibrated numbers at hand, by method name.
        vision_sites: kinds of vision sites where rows may be dropped or merged; ``"middle"`` stands for the place between
            attention and MLP of encoder blocks.
        rotary_axes: frequencies of each axis of the rotary embedding: one number, or three under M-RoPE.
        recurrent: decoder layers with a recurrent state instead of attention.
        sliding: decoder layers with sliding attention.
        cell: pixels ``(channels, rows, columns)`` that make one token, where the patches site is open.
        companion: whether a text tower was given.
        patches: tokens of an image in the encoder, CLS not counted; None where images differ.
        experts: how many experts the router chooses for each row; None for a dense model.
        sparse: decoder layers with experts.
    """

    family: str
    decoder_layers: int
    encoder_layers: int | None
    feature_layer: int | None
    has_cls: bool
    rotary_rows: int
    mask_free: bool
    fingerprint: Fingerprint
    artifacts: Mapping[str, Artifact]
    vision_sites: frozenset[str] = frozenset()
    rotary_axes: tuple[int, ...] = ()
    recurrent: tuple[int, ...] = ()
    sliding: tuple[int, ...] = ()
    cell: tuple[int, int, int] | None = None
    companion: bool = False
    patches: int | None = None
    experts: int | None = None
    sparse: tuple[int, ...] = ()

    def refuse_sites(self, *kinds: str) -> str | None:
        """Why rows cannot be dropped at vision sites of these kinds; None if they can."""
        for kind in kinds:
            if kind not in self.vision_sites:
                there = ", ".join(sorted(self.vision_sites)) or "none"
                return f"needs the site {kind!r}, which {self.family} does not offer (its vision sites: {there})"
        return None

    def same_depth(self, layers: Sequence[int], of: int) -> tuple[int, ...]:
        """Decoder layers at the same shares of the depth as ``layers`` of ``of``: at least 1, strictly ascending."""
        found: list[int] = []
        for layer in layers:
            found.append(max(round(layer * self.decoder_layers / of), found[-1] + 1 if found else 1))
        return tuple(found)

    def refuse_layers(self, parameter: str, value: int | tuple[int, ...], attention: Sequence[int] = ()) -> str | None:
        """Why rows cannot go before the decoder layers in ``value`` of ``parameter``, given the ``attention`` of others."""
        layers = (value,) if isinstance(value, int) else value
        if any(not 1 <= layer < self.decoder_layers for layer in layers):
            return f"{parameter}={value}: must be in 1..{self.decoder_layers - 1}"
        recurrent = sorted(set(attention) & set(self.recurrent))
        if recurrent:
            return f"{parameter}={value}: reads the attention of layers {recurrent}, which are recurrent; choose others"
        return None


class Companion(Protocol):
    """A text tower beside the model, for methods that compare the question with the picture."""

    def question(self, ids: Sequence[Tensor]) -> list[Tensor]:
        """Embeddings ``[M, d]`` of each sample's question, given its token ids ``[n]`` in the model's own vocabulary."""

    def align(self, features: Tensor) -> Tensor:
        """Encoder features ``[I, n, D]`` in the same space: ``[I, n, d]``."""


@dataclass(frozen=True)
class Method(ABC):
    """One published system: a frozen set of hyperparameters that implements one or more of the protocols below."""

    name: ClassVar[str]
    title: ClassVar[str]
    group: ClassVar[str]
    paper: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    identity_at: ClassVar[Mapping[str, Any] | None] = None
    """Parameters at which the model's logits are unchanged; None where the system has no such setting."""

    def check(self, traits: Traits) -> str | None:
        """Why this method cannot run on such a model, with the remedy; None if it can."""
        return None

    def fitted(self, traits: Traits) -> Self:
        """The method with everything filled in that depends on the model: the one that runs."""
        return self

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The signals to record."""
        return ()

    def workspace(self, shape: Shape) -> int:
        """Most bytes that it and the engine hold beside what the unmodified model needs, artifacts not counted.

        The default is for methods that read nothing large: the engine's share.
        """
        return shape.edits

    def tunable(self, traits: Traits) -> Mapping[str, Tunable]:
        """What ``foveate tune`` is to search besides what it finds by itself: ``keep``, layers, stages and switches."""
        return {}

    def parameters(self) -> dict[str, Any]:
        """The budget, and the hyperparameters that differ from their defaults."""
        values = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {name: value for name, (value, default) in values.items() if name == "keep" or value != default}

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.parameters().items())
        return f"{self.name}({inside})" if inside else self.name

    def require_number(self, parameter: str, least: float, most: float = math.inf, *, whole: bool = False) -> None:
        """Raise one clear line unless ``parameter`` is a finite number (an integer, if ``whole``) in [least, most]."""
        value = getattr(self, parameter)
        kind = int if whole else int | float
        fits = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value) and least <= value <= most
        bounds = f"{least:g} or more" if most == math.inf else f"in [{least:g}, {most:g}]"
        self.require(fits, parameter, f"must be {'an integer' if whole else 'a number'}, {bounds}")

    def require_layers(self, parameter: str) -> None:
        """Raise one clear line unless ``parameter`` is a tuple of layers, ascending, none below 1."""
        value = getattr(self, parameter)
        fits = isinstance(value, tuple) and all(isinstance(layer, int) and not isinstance(layer, bool) for layer in value)
        ascending = fits and all(low < high for low, high in zip((0, *value), value))
        self.require(ascending, parameter, "must be ascending layer numbers, 1 or more, such as (4, 8)")

    def require_shares(self, parameter: str) -> None:
        """Raise one clear line unless ``parameter`` is a tuple of numbers in [0, 1]."""
        value = getattr(self, parameter)
        numbers = isinstance(value, tuple) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in value)
        self.require(numbers and all(0 <= v <= 1 for v in value), parameter, "must be shares in [0, 1], such as (0.5, 0.25)")

    def require(self, condition: bool, parameter: str, remedy: str) -> None:
        """Raise one clear line about ``parameter`` unless ``condition`` holds."""
        if not condition:
            raise FoveateError(f"{self.name}: {parameter}={getattr(self, parameter)!r}: {remedy}")


class Tokens(Method):
    """Drops, merges or inserts rows of the sequence at one or more sites."""

    cuts_caches: ClassVar[bool] = False
    """Whether its edits are for all layers (`Edit.all_layers`): earlier ones' caches are scored once they are made."""

    @abstractmethod
    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Where it acts."""

    @abstractmethod
    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """What becomes of the rows ``x`` ``[B, N, D]`` (all roles) at ``site``; None leaves them."""


@dataclass(frozen=True)
class ItemBatch:
    """Images of one grid, batched: what `ItemTokens.select` sees.

    Attributes:
        rows, columns: the original grid.
        ordinal: ``[I, n]`` raster index of each token still alive; all of them, in order, unless something came before.
        number: place of each image within its sample.
        seen: the method's encoder signals, ``[I, n, ...]`` by token (attention rows: ``[I, H, Q, n]``).
        x: ``[I, n, D]`` the tokens as the language model would get them.
        question: the sample's question rows of each image: ``[I, q, D]`` embeddings, zero where there are fewer.
        companion: the companion's question embeddings of each image ``[M, d]``, if asked for.
        seed: the session's seed.
        device: where the answer is wanted.
    """

    rows: int
    columns: int
    ordinal: Tensor
    number: tuple[int, ...]
    seen: Mapping[Signal, Any]
    x: Tensor
    question: Tensor
    companion: tuple[Tensor, ...]
    seed: int
    device: torch.device

    @property
    def count(self) -> int:
        """Tokens of each image that are still alive."""
        return self.ordinal.shape[1]


class ItemTokens(Tokens):
    """Chooses among the tokens of each image on its own, before the language model.

    Subclasses are dataclasses with the fields ``keep`` and ``positions`` and implement `select`. Budgets are shares of the
    original count. Positions are ``"contiguous"`` (as if the prompt had been short), ``"anchor"`` (the original ones),
    ``"rank"`` (as if the grid had been smaller) or ``"auto"``: contiguous where positions are one row, original under
    M-RoPE, which is what published code does.
    """

    keep: int | float
    positions: Positions
    identity_at = {"keep": 1.0}  # noqa: RUF012
    needs_grid: ClassVar[bool] = False
    """Whether it works only on a whole grid, so that nothing may be dropped or merged before it."""

    def __post_init__(self) -> None:
        self.budget()
        known = ("auto", "anchor", "contiguous", "rank")
        self.require(self.positions in known, "positions", "must be 'auto', 'anchor', 'contiguous' or 'rank'")

    def budget(self) -> Budget:
        """Tokens to keep of each image."""
        return Budget(self.keep, name=f"{self.name}: keep")

    def workspace(self, shape: Shape) -> int:
        """Beside the edit, each image's tokens and question."""
        return shape.edits + 2 * shape.hidden

    @abstractmethod
    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Indices ``[I, k]`` into the tokens alive that are to stay, ascending, without duplicates."""

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def check(self, traits: Traits) -> str | None:
        """Contiguous positions have no meaning under M-RoPE."""
        if self.positions == "contiguous" and traits.rotary_rows > 1:
            return f"positions='contiguous': {traits.family} has multi-row rotary positions; use 'anchor', 'rank' or 'auto'"
        return None

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Group the images by grid, select in each group, keep all other rows."""
        alive = layout.alive
        images = [(sample, number) for sample, items in enumerate(layout.items) for number in range(len(items))]
        kept_of = {(b, j): min(self.budget().of(layout.items[b][j].count), alive[b][j]) for b, j in images if alive[b][j]}
        if all(count == alive[b][j] for (b, j), count in kept_of.items()):
            return None

        groups: dict[tuple[int, int, int], list[tuple[int, int]]] = {}
        for b, j in kept_of:
            item = layout.items[b][j]
            groups.setdefault((item.rows, item.columns, alive[b][j]), []).append((b, j))
        kept = torch.zeros_like(layout.valid)
        asking = layout.question_rows
        asking = asking.masked_fill(layout.role.gather(1, asking.clamp(min=0)) != Role.TEXT, -1)[..., None]
        question = x.gather(1, asking.clamp(min=0).expand(-1, -1, x.shape[2])).masked_fill(asking < 0, 0)
        for (rows, columns, _), entries in groups.items():
            sample = torch.tensor([b for b, _ in entries], device=x.device)
            where = layout.where(entries)
            batch = ItemBatch(
                rows=rows,
                columns=columns,
                ordinal=layout.ordinal[sample[:, None], where],
                number=tuple(j for _, j in entries),
                seen={signal: value.of(entries) for signal, value in seen.items() if isinstance(value, ByItem)},
                x=x[sample[:, None], where],
                question=question[sample],
                companion=tuple(v[b] for s, v in seen.items() if isinstance(s, Question) for b, _ in entries),
                seed=state.get("session", "seed", 0),
                device=x.device,
            )
            with about(sample, where, layout.shape):
                chosen = where.gather(1, self.select(batch, kept_of[entries[0]]))
            kept[sample[:, None], chosen] = True

        visual = tuple(sum(kept_of.get((b, j), 0) for j in range(len(items))) for b, items in enumerate(layout.items))
        return layout.keeping(kept, visual, self.positions)


@dataclass(frozen=True)
class Plan:
    """Rows that pass through a layer unchanged; no row is removed.

    Attributes:
        active: ``[B, N]`` bool: rows that run through the layer.
        frozen: whether the other rows still have keys and values in this layer (True), or none at all (False).
        counts: active rows of each sample, where known (saves a host sync).
    """

    active: Tensor
    frozen: bool = False
    counts: tuple[int, ...] | None = None


class Routing(Method):
    """Rows temporarily without a query, output projection and MLP in some layers; no row is removed."""

    @abstractmethod
    def routed(self, traits: Traits) -> tuple[int, ...]:
        """Decoder layers in which it acts."""

    @abstractmethod
    def plan(self, layer: int, x: Tensor, layout: Layout, seen: Seen, state: State) -> Plan | None:
        """Which rows of ``x`` ``[B, N, D]`` run through decoder layer ``layer``; None for a plain layer."""


class Experts(Method):
    """Weighs the experts that the router has chosen for each row; those of weight zero do not run.

    Several of them in a recipe weigh in turn.
    """

    def weighed(self, traits: Traits) -> tuple[int, ...]:
        """Decoder layers in which it acts: all that have experts, unless a subclass says otherwise."""
        return traits.sparse

    @abstractmethod
    def weigh(self, layer: int, weights: Tensor, index: Tensor, layout: Layout, seen: Seen, state: State) -> Tensor | None:
        """New weights ``[B, N, K]``, 0 for each expert that is not to run; None leaves the router's.

        Asked in every forward, steps of decoding too.

        Args:
            layer: decoder layer.
            weights: ``[B, N, K]`` the router's, whatever it normalised them to; 0 in rows that pass this layer by.
            index: ``[B, N, K]`` numbers of the experts.
            layout: of the rows.
            seen: what was recorded.
            state: what the method remembers.
        """


@dataclass(frozen=True)
class Kept:
    """Cached entries that live on in a layer.

    Attributes:
        entries: ``[B, Hkv or 1, k]`` ascending; where there are fewer, padded with -1.
        ragged: whether heads keep different numbers: they are then stored by head, without the padding.
        counts: entries of each sample, where they are not those of its rows; the same for all heads.
    """

    entries: Tensor
    ragged: bool = False
    counts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Entries:
    """What a layer's cache holds, the current rows included.

    Attributes:
        tokens: ``[B, 1 or Hkv, n]`` number of each entry's token in the conversation, -1 = padding.
        visual: ``[B, 1 or Hkv, n]`` bool.
        counts: visual entries of each sample, on the host.
    """

    tokens: Tensor
    visual: Tensor
    counts: tuple[int, ...]


class Cache(Method):
    """Decides which cached keys and values live on, or are read. One owner for each recipe.

    A subclass overrides what it needs: `score` and `plan` (once a prompt has been read), `view` (each turn), `step` (each
    step of decoding).

    The layout that `score` and `plan` get is that of the layer's entries, all of them: ``keys.shape[2]`` is its width. Where
    a prompt comes behind text that was read before and is whole (a cached system prompt), that text is there as text, in
    front, and its entries are scored and budgeted like any other: so it comes out as if all had been read at once. Attention
    rows over them are those of ``Rows(..., keys="cache")``; only the prompt's own rows ask. Rows of an answer are padding.
    """

    whole_prompt: ClassVar[bool] = False
    """Whether it needs the queries of every row that it scores, so that no part may have been read before."""

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Scores of the layer's cached entries, in any shape (``keys``, ``values`` ``[B, Hkv, n, d]``), or None."""
        return None

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> Sequence[Kept | None]:
        """Once all layers are scored: what stays in each layer, or None for all of it."""
        return [None] * len(scores)

    def view(self, layer: int, entries: Entries, seen: Seen, layout: Layout) -> Tensor | None:
        """At the end of each turn's prompt: entries ``[B, 1, k]``, ascending, that decoding reads until the next turn.

        The whole cache stays (None: and is read). ``layout`` is that of the turn's rows.
        """
        return None

    def step(self, layer: int, prompt: int, held: int, tokens: int, length: int) -> int | None:
        """Before a step of decoding adds an entry: index of the one entry to evict, or None.

        Args:
            layer: decoder layer.
            prompt: entries that were left of the prompt.
            held: entries now there.
            tokens: ``length`` and all tokens since, this step's included.
            length: tokens of the prompt, before anything was dropped or evicted.
        """
        return None


class ModelCall(Protocol):
    """A model with calibration samples, as an `Offline` method sees it."""

    traits: Traits

    def logits(self, recipe: Any) -> Tensor:
        """Last prompt token's logits ``[S, V]`` of every sample, the model running under ``recipe``."""

    def read(self, *signals: Signal) -> Iterator[tuple[Layout, Seen]]:
        """Layout and signals of each batch of samples; nothing is dropped."""

    def weight(self, layer: int, name: Literal["query", "key"]) -> Tensor:
        """Weight ``[out, D]`` of a projection of decoder ``layer``."""


class Offline(Method):
    """Has numbers that are calibrated on a model before it can run."""

    @abstractmethod
    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """The numbers of its `Artifact`; tensors among them are stored as such."""


def protocols(method: type[Method] | Method) -> tuple[str, ...]:
    """Names of the protocols that a method implements."""
    kind = method if isinstance(method, type) else type(method)
    return tuple(p.__name__ for p in (Tokens, Routing, Experts, Cache, Offline) if issubclass(kind, p))
