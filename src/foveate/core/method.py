"""The protocols: the ways in which a published system may act on a model.

`ItemTokens` (`foveate.core.items`) and `Reuse` (`foveate.core.reuse`) have files of their own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from foveate.core.artifact import Artifact, Fingerprint
from foveate.core.errors import FoveateError
from foveate.core.layout import Edit, Layout
from foveate.core.model_call import ModelCall
from foveate.core.parameters import rules
from foveate.core.roles import VISUAL
from foveate.core.shape import Shape
from foveate.core.signal import Seen, Signal, Site
from foveate.core.state import State
from foveate.core.store import Entries as Entries
from foveate.core.store import Kept as Kept
from foveate.core.store import Packed as Packed
from foveate.core.traits import Traits
from foveate.core.tunable import Tunable


@dataclass(frozen=True)
class Method(ABC):
    """One published system: a frozen set of hyperparameters that implements one or more of the protocols below."""

    name: ClassVar[str]
    title: ClassVar[str]
    group: ClassVar[str]
    paper: ClassVar[str]
    helps: ClassVar[str] = ""
    """When it is the one to take, in a sentence or two."""
    trained: ClassVar[str] = ""
    """What the model was trained with in its paper, where the results depend on that; empty for models as they are."""
    needs: ClassVar[tuple[str, ...]] = ()
    textual: ClassVar[bool] = True
    """Whether it has anything to do in prompts without pictures: text models refuse it where it does not."""
    identity_at: ClassVar[Mapping[str, Any] | None] = None
    """Parameters at which the model's logits are unchanged; None where the system has no such setting."""
    budgeted: ClassVar[str] = "keep"
    """The parameter, if there is one of that name, that a bench's or a tune's budget fills in: another than ``keep`` where
    it is a limit, not the number of tokens that live."""

    def __post_init__(self) -> None:
        """Refuse values that the fields' annotations do not allow; lists become tuples."""
        for parameter, allowed in rules(type(self)).items():
            if allowed and isinstance(getattr(self, parameter), list):
                object.__setattr__(self, parameter, tuple(getattr(self, parameter)))
            for rule in allowed:
                self.require(rule.fits(getattr(self, parameter)), parameter, f"must be {rule}")

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
        return {name: value for name, (value, default) in values.items() if name == self.budgeted or value != default}

    def __str__(self) -> str:
        inside = ", ".join(f"{name}={value!r}" for name, value in self.parameters().items())
        return f"{self.name}({inside})" if inside else self.name

    @classmethod
    def takes_budget(cls) -> bool:
        """Whether it has the parameter `budgeted`."""
        return any(field.name == cls.budgeted for field in fields(cls))

    def require(self, condition: bool, parameter: str, remedy: str) -> None:
        """Raise one clear line about ``parameter`` unless ``condition`` holds."""
        if not condition:
            raise FoveateError(f"{self.name}: {parameter}={getattr(self, parameter)!r}: {remedy}")


class Pictures(Method):
    """Changes the size of pictures before the processor gets them.

    What the model is called with says nothing of the picture that it was made of, so pictures come by `Session.pictures`.
    """

    textual = False

    @abstractmethod
    def resize(self, size: tuple[int, int], tokens: Callable[[tuple[int, int]], int]) -> tuple[int, int]:
        """The size (rows and columns of pixels) that a picture of ``size`` is to have.

        ``tokens`` says how many visual tokens the model gets of a picture of a size.

        Raises:
            FoveateError: if no size does what it is to do.
        """


class Tokens(Method):
    """Drops, merges or inserts rows of the sequence at one or more sites."""

    textual = False

    cuts_caches: ClassVar[bool] = False
    """Whether its edits are for all layers (`Edit.all_layers`): earlier ones' caches are scored once they are made."""
    needs_grid: ClassVar[bool] = False
    """Whether, before the language model, it works only on whole grids: nothing may be dropped or merged before it."""
    inserts: ClassVar[bool] = False
    """Whether its edits put rows in (`Edit.inserted`), which no layer may route and no earlier cache lose."""
    moves: ClassVar[bool] = False
    """Whether its edits give rows rotary positions of their own (tensors), which only the engine's own decoder takes."""

    @abstractmethod
    def sites(self, traits: Traits) -> tuple[Site, ...]:
        """Where it acts."""

    @abstractmethod
    def edit(self, site: Site, x: Tensor, layout: Layout, seen: Seen, state: State) -> Edit | None:
        """What becomes of the rows ``x`` ``[B, N, D]`` (all roles) at ``site``; None leaves them."""


@dataclass(frozen=True)
class Plan:
    """Rows that pass through a layer unchanged; no row is removed.

    Attributes:
        active: ``[B, N]`` bool: rows that run through the layer.
        frozen: whether the other rows still have keys and values in this layer (True), or none at all (False).
        counts: active rows of each sample, where known (saves a host sync).
        visual: the same for visual rows.
    """

    active: Tensor
    frozen: bool = False
    counts: tuple[int, ...] | None = None
    visual: tuple[int, ...] | None = None

    @classmethod
    def of_text(cls, layout: Layout, frozen: bool = False) -> Plan | None:
        """All visual rows pass by; None for prompts without any."""
        if not any(layout.visual):
            return None
        counts = tuple(n - v for n, v in zip(layout.live, layout.visual))
        return cls(layout.valid & ~layout.rows(*VISUAL), frozen=frozen, counts=counts, visual=(0,) * len(counts))


class Routing(Method):
    """Rows temporarily without a query, output projection and MLP in some layers; no row is removed."""

    textual = False

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

    @property
    def echoes(self) -> bool:
        """Whether a row of which no expert runs gets its own input back as their output, instead of zeros."""
        return False

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


class Cache(Method):
    """Decides which cached keys and values live on, or are read. One owner for each recipe.

    A subclass overrides what it needs: `score` and `plan`, or `pack` in their place (once a prompt has been read), `view`
    (each turn), `step` (each step of decoding).

    The layout that those three get is that of the layer's entries, all of them: ``keys.shape[2]`` is its width. What was in
    the cache before the prompt (a cached system prompt) is there as text, in front, and its entries are scored and budgeted
    like any other. Attention rows over them are those of ``Rows(..., keys="cache")``, and columns are the mean over the
    queries of the prompt. Rows of an answer are padding.
    """

    @property
    def by_head(self) -> bool:
        """Whether heads may keep different numbers of entries, which are then stored by head."""
        return False

    @property
    def stepwise(self) -> bool:
        """Whether steps of decoding evict entries, which cannot be taken back."""
        return type(self).step is not Cache.step

    @property
    def layer_by_layer(self) -> bool:
        """Whether `plan` looks at each layer alone: a layer's cache may then shrink as soon as it is scored."""
        return False

    def score(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Tensor | None:
        """Scores of the layer's cached entries, in any shape (``keys``, ``values`` ``[B, Hkv, n, d]``), or None."""
        return None

    def plan(self, scores: Sequence[Tensor | None], layouts: Sequence[Layout]) -> Sequence[Kept | None]:
        """Once all layers are scored: what stays in each layer, or None for all of it."""
        return [None] * len(scores)

    def pack(self, layer: int, keys: Tensor, values: Tensor, seen: Seen, layout: Layout) -> Packed | None:
        """Once a prompt has been read: the store that some of the layer's entries go on in, or None for none.

        Arguments are those of `score`. What comes behind a layer that has a store stays as it is.
        """
        return None

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


class Offline(Method):
    """Has numbers that are calibrated on a model before it can run."""

    bound: ClassVar[tuple[str, ...]] = ()
    """Parameters that the numbers depend on: numbers that were made with others are refused."""
    marked: ClassVar[bool] = False
    """Whether it learns from pictures of which is known where they show what counts (`ModelCall.cells`)."""
    answered: ClassVar[bool] = False
    """Whether it looks at what predicts the right answers (`ModelCall.answers`), which then stand behind the prompts."""
    labels: ClassVar[tuple[str, ...]] = ()
    """The kinds of prompts that it compares, if it does (`ModelCall.labels`); they may be prompts without a picture."""

    @abstractmethod
    def calibrate(self, call: ModelCall) -> Mapping[str, Any]:
        """The numbers of its `Artifact`; tensors among them are stored as such."""

    def artifact(self, fingerprint: Fingerprint, numbers: Mapping[str, Any]) -> Artifact:
        """``numbers`` that were made with these parameters on the model with ``fingerprint``."""
        return Artifact(self.name, fingerprint, numbers, self._bound())

    def numbers(self, traits: Traits) -> Mapping[str, Any] | None:
        """Its numbers for such a model, None if there are none.

        Raises:
            FoveateError: if they were made on another model, or with other parameters.
        """
        return traits.numbers(self.name, self._bound())

    def refuse_numbers(self, traits: Traits, lacking: str, otherwise: str = "") -> str | None:
        """Why it cannot run without numbers, None if they are there: what is ``lacking``, and what to do ``otherwise``."""
        if self.numbers(traits) is not None:
            return None
        defaults = {f.name: f.default for f in fields(self)}
        changed = ", ".join(f"{name}={value!r}" for name, value in self._bound().items() if value != defaults[name])
        what = f'"{self.name}({changed})"' if changed else self.name
        return f"{lacking}; run `foveate calibrate {what}` on this model{otherwise}"

    def _bound(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.bound}
