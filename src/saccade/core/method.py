"""The protocols: the ways in which a published system may act on a model."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from saccade.core.artifact import Artifact, Fingerprint
from saccade.core.budget import Budget
from saccade.core.errors import SaccadeError
from saccade.core.layout import Edit, Layout
from saccade.core.reduction import Reduction
from saccade.core.signal import Seen, Signal, Site
from saccade.core.state import State


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

    def reads(self, traits: Traits) -> tuple[Signal, ...]:
        """The signals to record."""
        return ()

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

    def require(self, condition: bool, parameter: str, remedy: str) -> None:
        """Raise one clear line about ``parameter`` unless ``condition`` holds."""
        if not condition:
            raise SaccadeError(f"{self.name}: {parameter}={getattr(self, parameter)!r}: {remedy}")


class Tokens(Method):
    """Drops, merges or inserts rows of the sequence at one or more sites."""

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
        rows, columns: the grid; ``rows * columns`` tokens each.
        number: place of each image within its sample.
        seen: the method's encoder signals, ``[I, ...]``.
        seed: the session's seed.
        device: where the answer is wanted.
    """

    rows: int
    columns: int
    number: tuple[int, ...]
    seen: Mapping[Signal, Any]
    seed: int
    device: torch.device

    @property
    def count(self) -> int:
        """Tokens of each image."""
        return self.rows * self.columns


Positions = Literal["auto", "anchor", "contiguous"]


class ItemTokens(Tokens):
    """Chooses among the tokens of each image on its own, before the language model.

    Subclasses are dataclasses with the fields ``keep`` and ``positions`` and implement `select`. Positions are
    ``"contiguous"`` (as if the prompt had been short), ``"anchor"`` (the original ones) or ``"auto"``: contiguous where
    positions are one row, original under M-RoPE, which is what published code does.
    """

    keep: int | float
    positions: Positions
    identity_at = {"keep": 1.0}  # noqa: RUF012

    def __post_init__(self) -> None:
        self.budget()
        self.require(
            self.positions in ("auto", "anchor", "contiguous"), "positions", "must be 'auto', 'anchor' or 'contiguous'"
        )

    def budget(self) -> Budget:
        """Tokens to keep of each image."""
        return Budget(self.keep, name=f"{self.name}: keep")

    @abstractmethod
    def select(self, images: ItemBatch, k: int) -> Tensor:
        """Raster indices ``[I, k]`` of the tokens to keep, ascending, without duplicates."""

    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Before the language model."""
        return (Site("sequence"),)

    def check(self, traits: Traits) -> str | None:
        """Contiguous positions have no meaning under M-RoPE."""
        if self.positions == "contiguous" and traits.rotary_rows > 1:
            return f"positions='contiguous': {traits.family} has multi-row rotary positions; use 'anchor' or 'auto'"
        return None

    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """Group the images by grid, select in each group, keep all other rows."""
        images = [(sample, number) for sample, items in enumerate(layout.items) for number in range(len(items))]
        kept_of = {entry: self.budget().of(layout.items[entry[0]][entry[1]].count) for entry in images}
        if all(kept == layout.items[sample][number].count for (sample, number), kept in kept_of.items()):
            return None

        groups: dict[tuple[int, int], list[int]] = {}
        for index, (sample, number) in enumerate(images):
            item = layout.items[sample][number]
            groups.setdefault((item.rows, item.columns), []).append(index)
        table = torch.zeros(len(images), max(rows * columns for rows, columns in groups), dtype=torch.bool, device=x.device)
        for (rows, columns), members in groups.items():
            entries = [images[index] for index in members]
            source = torch.tensor([layout.items[b][j].source for b, j in entries], device=x.device)
            batch = ItemBatch(
                rows=rows,
                columns=columns,
                number=tuple(j for _, j in entries),
                seen={signal: value[source] for signal, value in seen.items()},
                seed=state.get("session", "seed", 0),
                device=x.device,
            )
            table[torch.tensor(members, device=x.device)[:, None], self.select(batch, kept_of[entries[0]])] = True

        offset = torch.tensor([sum(map(len, layout.items[:b])) for b in range(len(layout.items))], device=x.device)
        visual = layout.ordinal >= 0
        alive = table[(offset[:, None] + layout.item).clamp(min=0), layout.ordinal.clamp(min=0)]
        keep = layout.valid & (alive | ~visual)
        visual_kept = tuple(
            sum(kept_of[sample, number] for number in range(len(items))) for sample, items in enumerate(layout.items)
        )
        live = tuple(n - v + k for n, v, k in zip(layout.live, layout.visual, visual_kept))
        auto = "contiguous" if layout.positions.shape[0] == 1 else "anchor"
        positions = auto if self.positions == "auto" else self.positions
        return Edit(
            Reduction.keeping(keep, live),
            positions=positions,  # type: ignore[arg-type]
            live=live,
            visual=visual_kept,
        )


@dataclass(frozen=True)
class Plan:
    """Rows that pass through a layer unchanged, while other rows still read their keys and values.

    Attributes:
        frozen: ``[B, N]`` bool.
        active: how many rows stay active in each sample, where known (saves a host sync).
    """

    frozen: Tensor
    active: tuple[int, ...] | None = None


class Routing(Method):
    """Rows temporarily without a query, output projection and MLP in some layers; no row is removed."""

    @abstractmethod
    def routed(self, traits: Traits) -> tuple[int, ...]:
        """Decoder layers in which it acts."""

    @abstractmethod
    def plan(self, layer: int, layout: Layout) -> Plan | None:
        """Which rows are frozen in decoder layer ``layer``; None for a plain layer."""


class Cache(Method):
    """Decides, once a prompt has been read, which cached keys and values live on. One owner for each recipe."""

    @abstractmethod
    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Scores ``[B, Hkv, n]`` of the layer's cached entries (``keys``, ``values`` ``[B, Hkv, n, d]``), or None."""

    @abstractmethod
    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> list[Tensor | None]:
        """Once all layers are scored: entries ``[B, Hkv, k]`` that stay in each layer, ascending, or None for all.

        Samples of different length may be padded with -1.
        """


class ModelCall(Protocol):
    """A model with calibration samples, as an `Offline` method sees it."""

    traits: Traits

    def logits(self, recipe: Any) -> Tensor:
        """Last prompt token's logits ``[S, V]`` of every sample, the model running under ``recipe``."""


class Offline(Method):
    """Has numbers that are calibrated on a model before it can run."""

    @abstractmethod
    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """The numbers of its `Artifact`."""


def protocols(method: type[Method] | Method) -> tuple[str, ...]:
    """Names of the protocols that a method implements."""
    kind = method if isinstance(method, type) else type(method)
    return tuple(p.__name__ for p in (Tokens, Routing, Cache, Offline) if issubclass(kind, p))
